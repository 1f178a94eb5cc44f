from pathlib import Path

import pytest

from adapters.documents import Documents, open_documents


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    return open_documents(str(tmp_path))
