"""PEFT running one adapter alone: what the engine's answers are held against."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deployments.model.engine import Engine
from deployments.rows import Row
from tests.parity.board import Inputs, hooked, quantized
from tests.parity.making import Made, answer, load, reload
from tests.parity.variants import Variant

INPUT_TOLERANCE = 2e-5  # times the largest value of the input


@dataclass
class Oracle:
    """One adapter over the base, or over copies of the engine's quantised linears.

    Attributes:
        linears: Those copies, by path.
    """

    peft: PeftModel
    linears: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def over(cls, folder: str, variant: Variant, made: Made, engine: Engine) -> Oracle:
        oracle = cls(reload(load(folder, variant, made.num_labels), made))
        if engine.quantization == "none":
            return oracle
        model: nn.Module = oracle.peft.get_base_model()
        paths = {path for path, _ in model.named_modules()}
        for path, linear in quantized(engine).items():
            # Some have no pooler; and what an adapter brings whole is in fp32 for it.
            if path in paths and path not in made.saved:
                oracle.linears[path] = put(model, path, linear)
        # Attention's last bits decide how int8 rounds; without quantisation they may differ.
        model.set_attn_implementation(engine.encoder.config._attn_implementation)
        return oracle

    def ask(self, rows: Sequence[Row], width: int) -> list[torch.Tensor]:
        """Logits of each row, [labels] or [tokens, labels], padded right to a width."""
        config = self.peft.config
        if config.pad_token_id is None:
            if not self.linears:  # transformers takes one row at a time, and no padding
                return [self._ask([row], row.num_tokens, 0)[0] for row in rows]
            config.pad_token_id = 0  # no row has it
        return [*self._ask(rows, width, config.pad_token_id)]

    def _ask(self, rows: Sequence[Row], width: int, pad_id: int) -> torch.Tensor:
        ids = torch.full((len(rows), width), pad_id)
        mask, types = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for index, row in enumerate(rows):
            place = (index, slice(row.num_tokens))
            ids[place] = torch.tensor(row.tokens.ids)
            mask[place] = 1
            types[place] = torch.tensor(row.tokens.type_ids or [0] * row.num_tokens)
        segments = {"token_type_ids": types} if types.any() else {}
        return answer(self.peft, ids, attention_mask=mask, **segments)

    def ask_forced(
        self, rows: Sequence[Row], width: int, inputs: Inputs, places: Sequence[int], num_rows: int
    ) -> list[torch.Tensor]:
        """Ask, going on at every quantised linear with the engine's input, as test_parity does.

        PEFT must have arrived at that input by itself, but for rounding.
        """
        calls = dict.fromkeys(inputs, 0)

        def force(path: str, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            want = inputs[path][calls[path]]
            calls[path] += 1
            if len(want) == num_rows:  # else it is of no row, as DeBERTa's relative positions
                want = want[list(places)]
            if want.shape != given[0].shape and len(given[0]) == 1:
                want = want[:1]  # which the engine may hold once a row
            error = (given[0] - want).abs().max() / want.abs().max()
            assert error <= INPUT_TOLERANCE, f"{path} sees another input: {error:.1e}"
            return (want, *given[1:])

        shared = {path: m for path, m in self.linears.items() if path in inputs}
        with hooked((m, lambda _, x, path=p: force(path, x)) for p, m in shared.items()):
            logits = self.ask(rows, width)
        assert all(calls[path] == len(inputs[path]) for path in shared)
        return logits


def put(model: nn.Module, path: str, linear: nn.Module) -> nn.Module:
    """Put a copy of a quantised linear in the place of a model's own; return the copy.

    Only once the adapter is loaded: PEFT runs the initialisation of an adapter at that time, and
    some of them cannot be run on packed weights. What it has loaded into a bias stays.
    """
    place = model.get_submodule(path)
    own = place.base_layer if isinstance(place, BaseTunerLayer) else place
    new = copy.deepcopy(linear)
    new.bias = own.bias
    if not isinstance(place, BaseTunerLayer):
        model.set_submodule(path, new)
        return new
    place.base_layer = new
    for module in place.modules():
        if hasattr(module, "fan_in_fan_out"):  # the engine quantises a Conv1D as a linear
            module.fan_in_fan_out = False
    return new
