import pytest

from s2edit_pipeline.avatars.dataset import PictureSet, load_pictures
from s2edit_pipeline.avatars.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def pictures() -> PictureSet:
    """Eight training people, drawn, with masks."""
    return load_pictures(8, masks=True)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
