from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms
from served import COMMENT, MAKER, Place, is_bare, jpeg, pixels

from index.errors import GalleryError
from index.gallery import Gallery
from vse_app.queries import Options, Query
from vse_app.search_engine import Facts
from vse_app.search_service import SearchService
from vse_app.uploads import read_upload


def test_what_is_kept_of_an_upload(place: Place, service: SearchService) -> None:
    data = jpeg(77, (300, 200))
    assert COMMENT in data
    assert MAKER.encode() in data
    ids = service.add([read_upload(data), read_upload(data)], Facts("seen", {"a": 1}))
    assert ids[0] == ids[1]
    (kept,) = place.gallery.joinpath("uploads").iterdir()
    assert is_bare(kept.read_bytes())
    assert MAKER.encode() not in kept.read_bytes()
    with Image.open(kept) as image, Image.open(BytesIO(data)) as original:
        assert image.size == original.size
        assert np.abs(np.asarray(image, int) - np.asarray(original.convert("RGB"), int)).mean() < 3
    (again,) = service.add([read_upload(data)], Facts("seen", {"a": 1}))
    assert again == ids[0]
    (reworded,) = service.add([read_upload(data)], Facts("seen again"))
    assert service.search(Query(image=read_upload(data)), Options(k=1))[0].item.caption == "seen again"
    assert [path.name for path in place.gallery.joinpath("uploads").iterdir()] == [kept.name]
    assert service.remove([reworded, 1, 2, 5000]) == 3
    assert not kept.exists()
    assert place.pictures[0].exists()
    assert place.pictures[1].exists()


def test_large_uploads_are_shrunk(place: Place, service: SearchService) -> None:
    service.add([read_upload(jpeg(3, (4000, 1000)))], Facts())
    (kept,) = place.gallery.joinpath("uploads").iterdir()
    with Image.open(kept) as image:
        assert image.size == (1600, 400)


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        (Facts(), Facts("a cat", {"year": 2019})),
        (Facts("a dog"), Facts("a dog", {"year": 2019})),
        (Facts(None, {"n": 1}), Facts("a cat", {"n": 1})),
    ],
)
def test_a_picture_sent_again_keeps_what_is_not_said_anew(
    place: Place, service: SearchService, again: Facts, expected: Facts
) -> None:
    ids = service.add([pixels(1)], Facts("a cat", {"year": 2019}))
    assert service.add([pixels(1)], again) == ids
    with Gallery.open(place.gallery) as gallery:
        item = gallery.snapshot.item(ids[0])
    assert Facts(item.caption, item.metadata) == expected


def test_uploads_are_kept_in_srgb(place: Place, service: SearchService) -> None:
    profile, sent = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), BytesIO()
    swapped = profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    Image.new("RGB", (40, 40), (200, 90, 30)).save(sent, "PNG", icc_profile=swapped)
    picture = read_upload(sent.getvalue())
    service.add([picture], Facts())
    (kept,) = place.gallery.joinpath("uploads").iterdir()
    with Image.open(kept) as image:
        assert "icc_profile" not in image.info
        shown = np.asarray(image)[20, 20].astype(int)
    assert shown[1] > shown[0] > shown[2]  # red and green have changed places
    assert np.abs(shown - np.asarray(picture)[20, 20]).max() <= 3


def test_what_could_not_be_added_is_not_kept(
    place: Place, service: SearchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    (known,) = service.add([pixels(1)], Facts())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "add", full)
        with pytest.raises(OSError, match="No space"):
            service.add([pixels(1), pixels(300)], Facts("other"))
    with pytest.raises(GalleryError, match="not Unicode"):
        service.add([pixels(301)], Facts("\ud800"))
    with Gallery.open(place.gallery, writable=True), pytest.raises(GalleryError, match="another writer"):
        service.add([pixels(302)], Facts())
    (path,) = place.gallery.joinpath("uploads").iterdir()
    (found,) = service.search(Query(image=path), Options(k=1))
    assert (found.id, found.item.path) == (known, str(path))
