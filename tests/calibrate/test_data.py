"""What is held out stays out."""

from bmjax.branch.loader import Loader
from tests.calibrate.tiny_models import batches, documents


def test_held_out_documents_are_never_learned_from(models):
    calibration, _ = batches(models, "a")
    for loader, held in zip(calibration.loaders, calibration.held_out, strict=True):
        assert isinstance(loader, Loader)
        seen = {tuple(e.tokens) for e in loader.dataset.examples}
        judged = [tuple(t) for t, _ in documents(held)]
        assert len(judged) == 4 and not seen & set(judged)
