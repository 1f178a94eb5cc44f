"""The application with a model that writes down which rows each of its replicas has computed."""

# No `from __future__ import annotations`, as in deployments/app.py.
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray.serve import Application

import deployments.app
from deployments.config import Args
from deployments.model.deployment import Model

# What a replica writes lies beside the store: a line a row, its ids.
ROWS = "rows-{pid}.jsonl"


class Recording(Model):
    async def __init__(self, args: Args) -> None:
        await Model.__init__(self, args)
        self.engine.predict = self._recorded(self.engine.predict, args)  # type: ignore[method-assign]

    @staticmethod
    def _recorded(predict: Any, args: Args) -> Any:
        path = Path(args.adapter_store).parent / ROWS.format(pid=os.getpid())
        file = path.open("a", buffering=1)

        def recorded(rows: Any) -> Any:
            answers = predict(rows)
            file.writelines(json.dumps(list(row.tokens.ids)) + "\n" for row in rows)
            return answers

        return recorded


def build(args: Args) -> Application:
    with patch.object(deployments.app, "Model", Recording):
        return deployments.app.build(args)
