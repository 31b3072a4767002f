"""A signature is one of all files by one key, or it is refused; the key itself is shown nowhere."""

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.errors import ArtifactError, RecipeError
from distill.export.manifest import SIGNATURE_FILE, read_manifest, result_digest, verify_files
from distill.export.signing import KEY_VARIABLE, sign_artifact, signature_problem
from distill.export.verify import verify_artifact


class Keys(NamedTuple):
    private: Path
    public: Path


def make_keys(folder: Path, name: str) -> Keys:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    return Keys(private, public)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path, "ours")


@pytest.fixture
def signed(tmp_path: Path, artifacts: Any, keys: Keys) -> Path:
    """An artifact with a signature of ours."""
    folder: Path = artifacts.make(tmp_path / "artifact")
    before = read_manifest(folder)
    assert sign_artifact(folder, keys.private) == folder / SIGNATURE_FILE
    assert read_manifest(folder) == before and result_digest(verify_files(folder)) == result_digest(before)
    return folder


def signature_of(folder: Path, public_key: Path | None = None) -> tuple[str, str]:
    checks = {check.name: check for check in verify_artifact(folder, golden=False, public_key=public_key)}
    return checks["signature"].status, checks["signature"].detail


def test_a_signature_is_checked_with_a_key_and_not_run_without(signed: Path, keys: Keys) -> None:
    assert signature_of(signed, keys.public) == ("passed", "all files are signed by ours.pub.pem")
    status, detail = signature_of(signed)
    assert status == "not_run" and "--public-key" in detail
    text = (signed / SIGNATURE_FILE).read_text()
    assert "PRIVATE" not in text and keys.private.read_text().split("\n")[1] not in text
    assert not [path for path in signed.parent.iterdir() if path.name.endswith(".part")]


def test_another_key_does_not_match(signed: Path, tmp_path: Path) -> None:
    status, detail = signature_of(signed, make_keys(tmp_path, "theirs").public)
    assert status == "failed" and "Key mismatch" in detail


def test_an_artifact_that_was_changed_and_sealed_anew_has_not_the_signature_any_more(
    signed: Path, keys: Keys, artifacts: Any
) -> None:
    kept = (signed / SIGNATURE_FILE).read_bytes()
    (signed / "onnx/model_q4.onnx_data").write_bytes(bytes(16))
    artifacts.reseal(signed)
    assert signature_of(signed, keys.public) == ("failed", "the artifact is not signed (no model.sig)")
    (signed / SIGNATURE_FILE).write_bytes(kept)
    status, detail = signature_of(signed, keys.public)
    names = "bom.cdx.json, manifest.json, onnx/model_q4.onnx_data"
    assert (status, detail) == ("failed", f"the key signed other bytes: {names}")


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "onnx/model_q4.onnx"])
def test_every_file_is_signed_the_manifest_too(signed: Path, keys: Keys, name: str) -> None:
    assert signature_problem(signed, keys.public) is None
    (signed / name).write_bytes((signed / name).read_bytes() + b" ")
    assert name in str(signature_problem(signed, keys.public))


def test_a_file_that_was_added_is_not_signed(signed: Path, keys: Keys) -> None:
    (signed / ".gitattributes").write_text("x")
    assert signature_problem(signed, keys.public) == "the key signed other bytes: .gitattributes"


def test_a_file_that_was_taken_away_was_signed(signed: Path, keys: Keys) -> None:
    (signed / "config.json").unlink()
    assert signature_problem(signed, keys.public) == "the key signed other bytes: config.json"


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"mediaType": "x"}', "\ufffd"])
def test_a_malformed_signature_is_no_signature(signed: Path, keys: Keys, text: str) -> None:
    (signed / SIGNATURE_FILE).write_text(text)
    status, detail = signature_of(signed, keys.public)
    assert status == "failed" and detail and "\n" not in detail


def test_a_signature_that_leads_elsewhere_is_refused(signed: Path, keys: Keys) -> None:
    (signed / SIGNATURE_FILE).rename(signed.parent / "sig")
    (signed / SIGNATURE_FILE).symlink_to("../sig")
    with pytest.raises(ArtifactError, match=r"model\.sig is a link that leads out of the folder"):
        verify_artifact(signed, golden=False, public_key=keys.public)


def test_a_damaged_artifact_is_not_signed(signed: Path, keys: Keys) -> None:
    (signed / "onnx/model_q4.onnx_data").write_bytes(bytes(16))
    with pytest.raises(ArtifactError, match="was changed"):
        sign_artifact(signed, keys.private)


def test_the_key_comes_from_the_environment_where_none_is_given(
    signed: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(RecipeError, match="no key to sign with; give --key"):
        sign_artifact(signed)
    other = make_keys(tmp_path, "other")
    monkeypatch.setenv(KEY_VARIABLE, str(other.private))
    sign_artifact(signed)
    assert signature_of(signed, other.public)[0] == "passed"
    assert signature_of(signed, keys.public)[0] == "failed"


def test_what_is_no_key_is_refused_and_not_shown(signed: Path, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such key file"):
        sign_artifact(signed, tmp_path / "nothing.pem")
    bad = tmp_path / "bad.pem"
    bad.write_text("hunter2")
    for use in (lambda: sign_artifact(signed, bad), lambda: signature_problem(signed, bad)):
        with pytest.raises(RecipeError, match=r"bad\.pem: is no p") as caught:
            use()
        assert "hunter2" not in str(caught.value)
    with pytest.raises(RecipeError, match="is no public key"):
        signature_problem(signed, keys.private)


def test_the_librarys_own_settings_verify_the_signature_too(signed: Path, keys: Keys) -> None:
    from model_signing import verifying

    verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(signed, signed / SIGNATURE_FILE)


@pytest.mark.full
def test_the_librarys_own_command_verifies_the_signature(signed: Path, keys: Keys) -> None:
    import sys

    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    given = ["--signature", str(signed / SIGNATURE_FILE), "--public_key", str(keys.public)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
