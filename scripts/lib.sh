# Sourced by the other scripts: the environment in .venv, installed once for each state of what it is made from.
#
#   PYTHON      the interpreter that .venv is made with      (default: the first of 3.11 or newer)
#   TORCH_SPEC  what pip is given for torch, options allowed (default: the version in docker/constraints.txt)

venv=.venv

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python"
}

# install_package [EXTRA]: make .venv where it is missing and install this package with its extra into it.
# torch comes first and keeps its version from then on, as does the Triton it brings, so that nothing else can bring in
# another one.
install_package() {
    local extra=${1:-} target=. stamp key python torch constraints installed
    command -v g++ >/dev/null || fail "g++ is missing, and DeepSpeed compiles with it: install a C++ compiler"
    stamp=$venv/.installed${extra:+-$extra}
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "making $venv with $python"
        "$python" -m venv "$venv" || fail "$python cannot make $venv: install its venv module"
    fi
    PATH=$PWD/$venv/bin:$PATH
    key=$(cat pyproject.toml docker/constraints.txt scripts/lib.sh | cksum)
    [[ -f $stamp && $(<"$stamp") == "$key" ]] && return

    if ! python -c 'import torch' 2>/dev/null; then
        read -ra torch <<<"${TORCH_SPEC:-$(grep '^torch==' docker/constraints.txt)}"
        echo "installing ${torch[*]} into $venv"
        python -m pip install --quiet "${torch[@]}"
    fi
    constraints=$venv/constraints.txt
    installed=(torch)
    python -c 'import triton' 2>/dev/null && installed+=(triton) # torch's CUDA builds bring the one that suits them
    grep -vE "^($(IFS='|'; echo "${installed[*]}"))==" docker/constraints.txt >"$constraints"
    python -c 'import sys; from importlib.metadata import version; [print(f"{n}=={version(n)}") for n in sys.argv[1:]]' \
        "${installed[@]}" >>"$constraints"
    [[ -n $extra ]] && target=".[$extra]"
    echo "installing moe_llm and what it needs into $venv, which takes minutes"
    python -m pip install --quiet -c "$constraints" -e "$target"
    echo "$key" >"$stamp"
}
