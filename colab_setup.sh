#!/usr/bin/env bash
# Set lorakit up on Colab, RunPod, Vast.ai or your own machine. Run it again whenever you like.
#
#   bash colab_setup.sh              install what is missing
#   bash colab_setup.sh demo [...]   … then train a LoRA on the embedded base (options: python -m lorakit demo --help)
#   bash colab_setup.sh test [...]   … then lint and test (options: pytest --help)
#   bash colab_setup.sh test --all   … in browsers and on Colab's versions too, with coverage
#
# What the host ships stays as it is: pip keeps every installed package at its version. Only a package
# older than lorakit can use is replaced, never torch, and a torchao that peft refuses is removed. Where the host has
# no torch to offer, everything goes into .venv next to this file. LORAKIT_PYTHON names the Python to install into
# instead: a notebook gives its kernel's.
#
# Run without its checkout (as Vast.ai's PROVISIONING_SCRIPT is), it clones $LORAKIT_REPOSITORY first.
set -euo pipefail

CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*" >&2; }
die() {
    say "colab_setup.sh: $*"
    exit 1
}

# ── Which Python ────────────────────────────────────────────────────────────────────────────────────────────────────

modern() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >"$work/log" 2>&1; }

# A Debian that keeps pip out of its own Python; images meant for pip set PIP_BREAK_SYSTEM_PACKAGES.
managed() {
    [[ -z ${PIP_BREAK_SYSTEM_PACKAGES:-} ]] && "$1" -c '
import os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(not (sys.prefix == sys.base_prefix and os.path.exists(marker)))'
}

# Sets python.
choose_python() {
    local candidate
    if [[ -n ${LORAKIT_PYTHON:-} ]]; then
        modern "$LORAKIT_PYTHON" || die "LORAKIT_PYTHON, $LORAKIT_PYTHON, is no Python ≥ 3.10. Name another."
        python=$(command -v "$LORAKIT_PYTHON")
        return
    fi
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"; do
        if [[ -n $candidate ]]; then
            modern "$candidate" ||
                die "the active environment's $candidate is no Python ≥ 3.10. Deactivate it, or activate a newer one."
            python=$candidate
            return
        fi
    done
    if modern "$root/.venv/bin/python"; then
        python=$root/.venv/bin/python
        return
    fi
    # Vast.ai keeps its torch in /venv/main, the others where python3 finds it.
    for candidate in /venv/main/bin/python python3; do
        if modern "$candidate"; then
            python=$(command -v "$candidate")
            if ! look || [[ $torch == none || $torch == old:* ]]; then continue; fi
            if managed "$python"; then make_venv "$python" --system-site-packages; fi
            return
        fi
    done
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if modern "$candidate"; then
            make_venv "$candidate"
            return
        fi
    done
    die "lorakit needs Python ≥ 3.10, and this machine has $(python3 --version 2>/dev/null || echo 'no Python 3')." \
        "Install a newer one (for example: apt install python3.12 python3.12-venv) and run this again."
}

# Make .venv with Python $1 and the options of `venv` that follow.
make_venv() {
    local base=$1 venv=$root/.venv own
    shift
    python=$venv/bin/python
    if [[ -x $python ]] && "$python" --version >"$work/log" 2>&1; then
        die "$venv holds $(cat "$work/log"), and lorakit needs ≥ 3.10. Remove that folder and run this again."
    fi
    own=$([[ -e $venv ]] || echo yes)
    # --clear: a .venv whose Python does not run (the image changed, or its making was cut) is of no use to anybody.
    "$base" -m venv --clear "$@" "$venv" >"$work/log" 2>&1 && return
    uv venv --quiet --seed --clear --python "$base" "$@" "$venv" >/dev/null 2>&1 && return
    "$base" -m virtualenv --quiet --clear "$@" "$venv" >/dev/null 2>&1 && return
    virtualenv --quiet --clear --python "$base" "$@" "$venv" >/dev/null 2>&1 && return
    if [[ -n $own ]]; then rm -rf "$venv"; fi
    say "$(<"$work/log")"
    die "$base cannot make a virtual environment. On Debian or Ubuntu:" \
        "apt install $("$base" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))') — or install uv;" \
        "then run this again."
}

# ── What it lacks ───────────────────────────────────────────────────────────────────────────────────────────────────

# Sets missing (how many requirements besides torch), torch (its version, none or old:VERSION), torchao (the version
# that peft refuses, or none), package (ok, or missing where Python does not find this lorakit) and release (Python's).
# Writes into $work: missing.txt for pip, host.txt (what pip must not change), tested.txt (the same and, for all that
# is not there yet, the versions lorakit was tested with) and installed.txt.
look() {
    # shellcheck disable=SC2086 # extras is a list of words
    "$python" - "$root" "$work" $extras >"$work/state" 2>"$work/log" <<'PYTHON' || return 1
import filecmp
import re
import sys
from importlib import metadata, util
from pathlib import Path

sys.path = [entry for entry in sys.path if entry]  # not what happens to lie in the current folder

try:
    import tomllib
except ImportError:  # Python 3.10
    try:
        import tomli as tomllib
    except ImportError:
        from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

root, work, extras = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
source = root / "lorakit"
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
wanted = {canonicalize_name(r.name): r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate()}

installed = {}
for distribution in metadata.distributions():
    name = (distribution.metadata or {}).get("Name")
    if name and distribution.version:
        installed.setdefault(canonicalize_name(name), distribution)  # the first on sys.path is the one imported
versions = {name: distribution.version for name, distribution in installed.items()}

lacking = {
    name: requirement
    for name, requirement in wanted.items()
    if name not in versions or not requirement.specifier.contains(versions[name], prereleases=True)
}
torch = versions.get("torch", "none")
if torch != "none" and "torch" in lacking:
    torch = "old:" + torch
peft = "99" if "peft" in lacking else versions["peft"]
torchao = versions.get("torchao", "none")
if torchao != "none" and (Version(torchao) >= Version("0.16") or Version(peft) < Version("0.19")):
    torchao = "none"

# A package that is too old is replaced, and with it what it stands on, where the new one asks for that.
loose = {"pip", "setuptools", "wheel", "lorakit", "torchao"}
queue = [name for name in lacking if name in installed]
while queue:
    name = queue.pop()
    if name not in loose and not re.match(r"(torch|triton|nvidia|cuda)", name):
        loose.add(name)
        requires = [Requirement(line) for line in (installed[name].requires or [])] if name in installed else []
        queue += [canonicalize_name(r.name) for r in requires if r.marker is None or r.marker.evaluate({"extra": ""})]
host = [f"{name}=={version}" for name, version in versions.items() if name not in loose]
tested = []
for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
    line = line.partition("#")[0].strip()
    name = canonicalize_name(Requirement(line).name) if line else ""
    if name and (name in loose or name not in versions):
        tested.append(line)


def same(copy):
    """Whether a copied package still is what this checkout holds."""
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    files = [file for file in files if "__pycache__" not in file.parts]
    return all((copy / file).is_file() and filecmp.cmp(source / file, copy / file) for file in files)


spec = util.find_spec("lorakit")
place = Path(spec.origin).resolve().parent if spec and spec.origin else None
package = "ok" if place and (place == source.resolve() or same(place)) else "missing"


def write(name, lines):
    (work / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


missing = [str(requirement) for name, requirement in lacking.items() if name != "torch"]
write("missing.txt", missing)
write("host.txt", host)
write("tested.txt", host + tested)
write("installed.txt", sorted(f"{name}=={version}" for name, version in versions.items() if name != "lorakit"))
print(len(missing), torch, torchao, package, sys.version.split()[0])
PYTHON
    read -r missing torch torchao package release <"$work/state"
}

# ── Installing it ───────────────────────────────────────────────────────────────────────────────────────────────────

pip() {
    # Python compiles what it imports, unless it is forbidden to; compiling all that is installed takes far longer.
    local compile=no
    if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then compile=yes; fi
    PIP_COMPILE=$compile PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 \
        "$python" -m pip "$@" >"$work/log" 2>&1
}

# Add packages in their tested versions; where the host's own packages do not go with those, in any that do.
add() {
    pip install -c "$work/tested.txt" "$@" && return
    grep -qE 'ResolutionImpossible|No matching distribution' "$work/log" && pip install -c "$work/host.txt" "$@"
}

explain() {
    tail -n 30 "$work/log" >&2
    die "$*"
}

add_torch() {
    local pinned index=()
    pinned=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$root/constraints.txt")
    say "Installing ${pinned/==/ } …"
    if [[ $(uname -s) != Linux || -n $nvidia ]]; then
        add "$pinned" || explain "$pinned could not be installed: see pip's words above."
        return
    fi
    # For Linux, PyPI's torch brings gigabytes of CUDA along. Only a build marked "+cpu" is sure not to.
    if "$python" -c "import urllib.request as u; u.urlopen('$CPU_INDEX/torch/', timeout=4)" >"$work/log" 2>&1; then
        index=(--extra-index-url "$CPU_INDEX")
    fi
    pip install -c "$work/tested.txt" ${index[@]+"${index[@]}"} "$pinned+cpu" && return
    grep -qE 'ResolutionImpossible|No matching distribution' "$work/log" ||
        explain "$pinned+cpu could not be installed: see pip's words above."
    die "there is no CPU build of $pinned for Python $release, neither at $CPU_INDEX nor where pip looks, and PyPI's" \
        "build brings gigabytes of CUDA that are of no use without an NVIDIA card. If you want it all the same:" \
        "$python -m pip install $pinned — and run this again."
}

in_order() { [[ $missing == 0 && $torch != none && $torchao == none && $package == ok ]]; }

set_up() {
    local before did=() added=0
    nvidia=$(nvidia-smi -L 2>/dev/null | grep '^GPU ' || true)
    choose_python
    "$python" -c 'import pip' >"$work/log" 2>&1 || "$python" -m ensurepip >"$work/log" 2>&1 ||
        explain "$python has no pip. Install it (for example: apt install python3-pip) and run this again."
    look || explain "$python cannot say what it has installed: see its words above."
    cp "$work/installed.txt" "$work/before.txt"
    before=$package
    if [[ -n ${LORAKIT_PYTHON:-} ]] && ! in_order && managed "$python"; then
        die "$python belongs to the system, which lets nobody install into it. Run Jupyter from an environment of its" \
            "own ($python -m venv …), or allow it: PIP_BREAK_SYSTEM_PACKAGES=1."
    fi

    if [[ $torch == old:* ]]; then
        die "$python has torch ${torch#old:}, which is too old: see pyproject.toml. It is not replaced, because other" \
            "packages there stand on it. Choose a newer image, or leave that environment and run this again."
    fi
    if [[ $torchao != none ]]; then
        pip uninstall --yes torchao || explain "torchao $torchao could not be removed, and peft refuses it."
        did+=("removed torchao $torchao, because peft refuses any before 0.16")
    fi
    if [[ $torch == none ]]; then
        add_torch
        if [[ -n $nvidia ]] && ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>"$work/log"; then
            did+=("but torch cannot use the NVIDIA card; is its driver too old?")
        fi
        look
    fi
    if [[ $missing != 0 ]]; then
        say "Installing $(sed 's/[^A-Za-z0-9_-].*//' "$work/missing.txt" | paste -sd ' ' -) …"
        add -r "$work/missing.txt" || explain "Not everything could be installed: see pip's words above."
    fi
    # For 8-bit optimizers; lorakit runs without.
    if [[ -n $nvidia ]] && ! "$python" -c 'import importlib.metadata as m; m.version("bitsandbytes")' 2>"$work/log"; then
        look
        add "bitsandbytes>=0.45" || did+=("continued without bitsandbytes, which could not be installed")
    fi
    if [[ $package != ok ]]; then
        # Colab's kernel already runs: it finds a copy, but not an editable install, which is read at the start.
        local editable=--editable
        if [[ -n ${COLAB_RELEASE_TAG:-} ]]; then editable=--force-reinstall; fi
        pip install --no-deps $editable "$root" || explain "lorakit itself could not be installed."
        added=1
    fi

    look
    in_order ||
        die "$python is not right yet: $missing requirements missing; torch $torch; old torchao $torchao; lorakit $package."
    added=$((added + $(LC_ALL=C comm -13 "$work/before.txt" "$work/installed.txt" | wc -l)))
    if [[ $added != 0 ]]; then
        did=("installed $added package$([[ $added == 1 ]] || echo s) in $SECONDS s" ${did[@]+"${did[@]}"})
    fi
    if [[ ${#did[@]} == 0 ]]; then did=("nothing to install"); fi
    if [[ -n ${LORAKIT_PYTHON:-} ]]; then
        : # a notebook's cell, which finds this checkout by itself
    elif [[ $python == "$root/.venv/bin/python" && ${VIRTUAL_ENV:-} != "$root/.venv" ]]; then
        did+=("in .venv (source $root/.venv/bin/activate)")
    elif [[ $before != ok && -n ${JPY_PARENT_PID:-} && -z ${COLAB_RELEASE_TAG:-} ]]; then
        did+=("restart the notebook's kernel to import it")
    fi
    printf 'lorakit is ready: Python %s, torch %s%s\n' "$release" "$torch" "$(printf ', %s' "${did[@]}")"
}

# ── What was asked for ──────────────────────────────────────────────────────────────────────────────────────────────

run_tests() {
    local failed="" more=()
    cd "$root"
    # What tests and their tools write goes with $work.
    export TMPDIR=$work/tmp RUFF_CACHE_DIR=$work/ruff COVERAGE_FILE=$work/coverage
    mkdir "$TMPDIR"
    if [[ " $* " == *" --all "* ]]; then
        more=(--cov=lorakit --durations=20)
        if [[ $* == --all ]]; then more+=(--cov-fail-under=95); fi
        # Tracing doubles the time; Python 3.12's monitoring does not.
        if [[ $release != 3.1[01].* ]]; then export COVERAGE_CORE=sysmon; fi
    fi
    "$python" -m ruff check . || failed="ruff check"
    "$python" -m ruff format --check . || failed="${failed:+$failed, }ruff format"
    "$python" -m mypy --cache-dir "$work/mypy" || failed="${failed:+$failed, }mypy"
    "$python" -m pytest -q --numprocesses logical --maxprocesses 4 --dist worksteal ${more[@]+"${more[@]}"} "$@" ||
        failed="${failed:+$failed, }pytest"
    [[ -z $failed ]] || die "failed: $failed"
}

main() {
    local task=${1:-}
    case $task in
    "" | demo) extras="notebook tensorboard" ;;
    test) extras="notebook tensorboard test" ;;
    *)
        say "usage: bash colab_setup.sh [demo | test] [options]"
        exit 2
        ;;
    esac
    if [[ $# != 0 ]]; then shift; fi

    root=$(cd "$(dirname "${BASH_SOURCE[0]:-.}")" && pwd)
    if [[ ! -f $root/lorakit/__init__.py ]]; then
        root=${WORKSPACE:-$PWD}/lorakit
        if [[ ! -f $root/colab_setup.sh ]]; then
            [[ -n ${LORAKIT_REPOSITORY:-} ]] || die "there is no lorakit next to this file, nor in $root." \
                "Run it from its checkout, or say where to clone it from: LORAKIT_REPOSITORY=https://…"
            git clone --quiet --depth 1 "$LORAKIT_REPOSITORY" "$root"
        fi
        exec bash "$root/colab_setup.sh" ${task:+"$task"} "$@"
    fi

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    set_up
    case $task in
    demo) "$python" -m lorakit demo --out runs/demo "$@" ;;
    test) run_tests "$@" ;;
    esac
}

main "$@"
