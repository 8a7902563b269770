"""PEFT's tests of its methods with CeRA in their lists: `make test-peft`.

Downloads the source package of the installed PEFT, saves tiny random models under the names on the
Hub that the tests load, and runs pytest with `plugin.py`. Arguments go to pytest.
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SUITES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)
PACKAGE = "peft_tests"


def main() -> int:
    work = HERE.parents[1] / "build" / "peft_suite" / version("peft")
    suites = work / PACKAGE
    if not suites.is_dir():
        download(work)
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(work / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    env["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parents[1]), str(HERE), str(work), env.get("PYTHONPATH", "")]
    )
    if not (work / "hub").is_dir():
        subprocess.run([sys.executable, HERE / "models.py", work / "hub.part"], env=env, check=True)
        (work / "hub.part").rename(work / "hub")
    arguments = (
        sys.argv[1:]
        if any(a.startswith("test_") for a in sys.argv[1:])
        else [*SUITES, *sys.argv[1:]]
    )
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    return subprocess.run([*pytest, "--rootdir", work, *arguments], cwd=suites, env=env).returncode


def download(work: Path) -> None:
    """The tests of PEFT's source package, as a package of a name that nothing else has."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = ["--no-deps", "--no-binary", "peft", f"peft=={version('peft')}"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--dest", work, *wanted], check=True
    )
    (archive,) = work.glob("peft-*.tar.gz")
    with tarfile.open(archive) as package:
        package.extractall(work, filter="data")
    tests = work / archive.name.removesuffix(".tar.gz") / "tests"
    (tests / "__init__.py").touch()
    tests.rename(work / PACKAGE)


if __name__ == "__main__":
    sys.exit(main())
