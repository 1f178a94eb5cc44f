import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.store import Store
from deployments.base import BaseName
from deployments.config import Args
from deployments.model.sizing import Sizes, choose_sizes

DEFAULTS = Sizes(64, 16, 16, None)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"r": 10**9}, [2, 8]), ({"r": -5}, [2, 8]), ({"r": "8"}, [2, 8]), ({"r": [8]}, [2, 8]),
        ({"target_modules": [["query"]]}, [2, 8]), ({"target_modules": [5, None]}, [2, 8]),
        ({"target_modules": {"query": 1}}, [2, 8]), ({}, [10**12, 8]), ({}, ["2", 8]), ({}, 5),
        ({}, []), ({}, [[2], 8]), ({}, [-2, 8]), ([1], [2, 8]), ("r", [2, 8]),
    ],
)  # fmt: skip
def test_one_odd_folder_does_not_keep_the_base_from_being_served(
    tiny_base: str, tmp_path: Path, config: Any, shape: Any
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.classifier.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (folder / "adapter_model.safetensors").write_bytes(content)
    store, args = Store(tmp_path), Args(base_model=tiny_base, adapter_store=str(tmp_path))
    assert choose_sizes(args, BaseName.parse(tiny_base), store, torch.float32) == DEFAULTS
