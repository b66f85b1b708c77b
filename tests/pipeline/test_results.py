"""The written rule: most domains won, then the mean, then the loss, then the order."""

from bmjax.pipeline.results import choose


def table(**models):
    return {
        name: {domain: {"accuracy": a, "loss": l} for domain, (a, l) in zip("abc", values, strict=True)}
        for name, values in models.items()
    }


BACKBONE = [(0.3, 1.0), (0.3, 1.0), (0.3, 1.0)]


def test_winning_more_domains_beats_a_higher_mean():
    scores = table(backbone=BACKBONE, steady=[(0.31, 1), (0.31, 1), (0.31, 1)], lopsided=[(0.9, 1), (0.9, 1), (0.3, 1)])
    assert choose(scores, "accuracy") == "steady"


def test_mean_then_loss_then_order_decide_between_equals():
    better = [(0.4, 0.9), (0.4, 0.9), (0.4, 0.9)]
    assert choose(table(backbone=BACKBONE, x=[(0.35, 0.1)] * 3, y=better), "accuracy") == "y"
    assert choose(table(backbone=BACKBONE, x=better, y=[(0.4, 0.8)] * 3), "accuracy") == "y"
    assert choose(table(backbone=BACKBONE, x=better, y=better), "accuracy") == "x"


def test_by_loss_lower_is_better_and_no_accuracy_is_needed():
    scores = {
        "backbone": {"a": {"loss": 2.0}, "b": {"loss": 2.0}},
        "x": {"a": {"loss": 1.0}, "b": {"loss": 2.1}},
        "y": {"a": {"loss": 1.9}, "b": {"loss": 1.9}},
    }
    assert choose(scores, "loss") == choose(scores, "accuracy") == "y"
