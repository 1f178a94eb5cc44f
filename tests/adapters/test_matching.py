import re

import pytest

from adapters.matching import Matching

PATHS = [
    "classifier", "classifier.dense", "bert.classifier", "bert.classifier.out", "pre_classifier",
    "classifiers", "bert.pooler.dense", "bert.encoder.layer.1.attention.self.query", "score",
]  # fmt: skip
NAMES = [
    "classifier", "pooler", "score", "dense", "bert", "layer.1", "class.*", "(pooler|score)", "1",
    "classifier.dense", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_module_is_no_target_by_peft_s_own_pattern(name: str) -> None:
    matching = Matching("all-linear", modules_to_save=(name,))
    for path in PATHS:
        # peft.tuners.tuners_utils.check_target_module_exists
        saved = re.match(rf"(^|.*\.){name}($|\..*)", path) is not None
        assert matching.targets(path) is not saved, path
