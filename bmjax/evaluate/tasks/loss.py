"""Held-out loss: nats a token and bits a byte of whole answers that the model was not trained on."""

from bmjax.evaluate.tasks.task import Task, register

register(Task("held_out_loss", "loss of traces that you give, nats a token and bits a byte", needs_traces=True))
