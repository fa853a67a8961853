"""A small data set for the tests with Detectron2."""

import pytest

from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.drawn import write_coco


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Name of a data set of eight drawn images."""
    folder = tmp_path_factory.mktemp("shapes")
    return dataset_name(write_coco(folder, "train", 8, 64, 0), folder / "images")
