"""Services by name: what the user's file may hold, and sentences that show none of it."""

import folder_paths
import pytest
from glm_image.glm_core.errors import ServiceError
from glm_image.nodes.host.services import FILE, find_service, service_names

SECRET = "sesame-9"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the user's file."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))

    def write(text: str) -> None:
        file = tmp_path / "__glm_image" / FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    return write


def test_an_entry_with_all_keys(write, monkeypatch):
    monkeypatch.setenv("STUDIO_KEY", SECRET)
    write(
        "studio: {address: 'https://a.example:8790/ar/', key_env: STUDIO_KEY, time_limit: 5, "
        "ahead: 0}\nother: {address: 'http://[::1]:8790'}"
    )
    studio, other = find_service("studio"), find_service("other")
    assert (studio.address, studio.key) == ("https://a.example:8790/ar", SECRET)
    assert (studio.time_limit, studio.ahead) == (5, 0)
    assert (other.key, other.time_limit, other.ahead) == (None, 600, 4)
    assert service_names() == ["other", "studio"]
    assert SECRET not in repr(studio)
    assert "example" not in repr(studio)


def test_a_new_file_is_read_without_a_new_start(write):
    assert service_names() == []
    write("# nothing yet")
    assert service_names() == []
    write("a: {address: 'http://b'}")
    assert service_names() == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("b: {address: 'http://c'}", "no AR service 'a' in user/__glm_image/.* it has b. Write"),
        ("a: {key: X}", "The address of the AR service 'a' .* must be http://HOST:PORT"),
        ("a: {address: X}", "The address of the AR service 'a' .*something else"),
        ("a: {address: 'http://me:X@host'}", "The address of the AR service 'a'"),
        ("a: {address: 'ftp://X'}", "The address of the AR service 'a'"),
        ("a: {address: 'http://X:port'}", "The address of the AR service 'a'"),
        ("a: {address: 'http://b', key: [X]}", "The key of the AR service 'a' .* ASCII"),
        ('a: {address: "http://b", key: "X\\n"}', "The key of the AR service 'a'"),
        ("a: {address: 'http://b', key_env: NOWHERE}", "variable NOWHERE, which is not set"),
        ("a: {address: 'http://b', time_limit: 0}", "time_limit .* from 1 to 86400"),
        ("a: {address: 'http://b', ahead: 65}", "ahead .* from 0 to 64"),
        ("a: {adress: 'http://b'}", "has an entry 'adress'; use address, key"),
        ("a: X", "has no address"),
        ("- X", "must have a name for each service"),
        ("a: {key: 'X", "is not YAML"),
        ("a: !!python/object/apply:os.system [X]", "is not YAML"),
    ],
)
def test_a_broken_entry_is_a_sentence_without_its_value(write, text, said):
    write(text.replace("X", SECRET))
    with pytest.raises(ServiceError, match=said) as told:
        find_service("a")
    assert SECRET not in str(told.value)
    assert told.value.__suppress_context__ or told.value.__context__ is None
