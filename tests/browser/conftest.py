"""One real server, and its page in headless Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_image.scripts import environment, host
from glm_image.scripts.page import Page, open_page


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Iterator[str]:
    """A server whose only model has the name of the stored workflows."""
    base: Path = host.make_base(tmp_path_factory.mktemp("comfyui"))
    (base / "models" / "glm_image" / "GLM-Image").symlink_to(environment.ROOT / "tiny")
    with host.serve(environment.host(), base, threads=1) as address:
        yield address


@pytest.fixture(scope="session")
def shared_page(address: str) -> Iterator[Page]:
    """For tests that leave no message in it: loading a page takes longer than most of them."""
    with open_page(address) as page:
        yield page


@pytest.fixture
def page(shared_page: Page) -> Iterator[Page]:
    with shared_page.another() as page:
        yield page
