#!/usr/bin/env bash
# The environment. Source it (bash or zsh), or run one command in it:
#
#     source e.sh
#     ./e.sh bin/train.py results/first configs/cnn.gin
#
# It uses the conda environment of e.yml if you have made it (conda env create --file e.yml).
# Otherwise it makes .venv on first use, makes it again if that was interrupted or the folder was
# moved, and brings it up to date when the dependencies change.
#
# e.local.sh is sourced first if it exists. It is for this machine alone and git ignores it:
#
#     export DATA_DIR=/scratch/data RESULTS_DIR=/scratch/results
#     module load python/3.12

# All of this runs in your own shell when sourced: no options are set, no functions are defined,
# and the _e_ variables are removed at the end.
if [ -n "${ZSH_VERSION-}" ]; then
    [ "${ZSH_EVAL_CONTEXT-}" != toplevel ] || exec bash "$0" "$@"
    eval '_e_file=${(%):-%x}' # in quotes, because bash cannot read it
elif [ -n "${BASH_VERSION-}" ]; then
    _e_file=$BASH_SOURCE
else
    echo "e.sh: use bash or zsh" >&2
    return 1
fi
case $_e_file in
    */*) ;;
    *) _e_file=./$_e_file ;;
esac
while [ -L "$_e_file" ]; do
    _e_link=$(readlink "$_e_file")
    case $_e_link in
        /*) _e_file=$_e_link ;;
        *) _e_file=${_e_file%/*}/$_e_link ;;
    esac
done
_e_folder=$(unset CDPATH; builtin cd -P -- "${_e_file%/*}/" > /dev/null && builtin pwd -P)

if [ "${BASH_SOURCE-}" = "$0" ]; then
    case ${1-} in
        '' | -*)
            echo "usage: ./e.sh COMMAND [ARGUMENT ...]   or   source e.sh" >&2
            exit 2
            ;;
    esac
fi

# e.sh calls itself with this word. In this clean shell it finds or makes the environment and
# prints its folder; everything else goes to stderr.
if [ "${BASH_SOURCE-}" = "$0" ] && [ "$1" = _environment ]; then
    cd "$_e_folder" || exit 1
    say() { printf 'e.sh: %s\n' "$*" >&2; }

    # conda lists the environments it has made in ~/.conda/environments.txt.
    read -r _ name < e.yml # name: NAME
    list=${HOME-}/.conda/environments.txt
    [ -r "$list" ] || list=/dev/null
    while IFS= read -r prefix; do
        if [ -n "$prefix" ] && [ "${prefix##*/}" = "$name" ] && [ -x "$prefix/bin/python" ]; then
            printf '%s\n' "$prefix"
            exit
        fi
    done <<< "${CONDA_PREFIX-}"$'\n'"$(< "$list")"

    # The stamp is written last: without it, .venv is half made. It holds a checksum of what states
    # the dependencies, and the folder, since the commands in .venv/bin name it.
    checksum=$(awk 'BEGIN { kept = 1 } /^\[/ { kept = /^\[(project|build-system)/ } kept' \
        requirements.txt pyproject.toml | cksum)
    stamp="$checksum $_e_folder"
    ready() {
        old=
        [ ! -f .venv/stamp ] || read -r old < .venv/stamp
        [ "$old" = "$stamp" ] && [ -x .venv/bin/python ]
    }

    if ! ready; then
        for python in python3 python3.14 python3.13 python3.12 python3.11 ''; do
            "$python" -I -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 15))' > /dev/null 2>&1 && break
        done
        if [ -z "$python" ]; then
            say "needs Python 3.11 to 3.14 with venv and pip, and found none on PATH." \
                "Install one (Debian, Ubuntu: apt install python3-venv; macOS: brew install" \
                "python@3.13; a cluster: module load, in e.local.sh) or use conda:" \
                "conda env create --file e.yml"
            exit 1
        fi

        if [ ! -e .venv/lock ] && compgen -G '.venv/*' > /dev/null; then
            say "$_e_folder/.venv was not made by e.sh, which would remove what is in it: move it away"
            exit 1
        fi

        # One at a time. Every process with descriptor 9 holds the lock: pip keeps it even if this
        # shell is killed. Python takes it, since macOS has no flock command.
        mkdir -p .venv && exec 9>> .venv/lock < /dev/null || exit 1
        "$python" -I -c 'import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("e.sh: waiting for another e.sh, which is making .venv", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)' || exit 1

        if ! ready; then
            rm -f .venv/stamp
            if [ "${old#* * }" = "$_e_folder" ] && [ -x .venv/bin/python ]; then
                say "the dependencies have changed: bringing .venv up to date"
            else
                old=
                say "making the environment in $_e_folder/.venv, which takes some minutes"
                find .venv/ -mindepth 1 -maxdepth 1 ! -name lock -exec rm -rf {} +
                "$python" -I -m venv .venv >&2 || exit 1
            fi
            if ! .venv/bin/python -I -m pip install --quiet --disable-pip-version-check \
                -c requirements.txt '.[dev]' >&2; then
                # An update that pip refused changed nothing: try it again next time, as an update.
                [ -z "$old" ] || printf '%s\n' "$old" > .venv/stamp
                say "pip could not install the dependencies, see above; .venv is not ready"
                exit 1
            fi
            printf '%s\n' "$stamp" > .venv/stamp
        fi
    fi
    printf '%s\n' "$_e_folder/.venv"
    exit
fi

[ ! -f "$_e_folder/e.local.sh" ] || . "$_e_folder/e.local.sh" || : # its last status means nothing
_e_prefix=$(bash "$_e_folder/e.sh" _environment) || {
    unset _e_file _e_link _e_folder _e_prefix
    return 1 2> /dev/null || exit 1
}
case $PATH in
    "$_e_prefix/bin":*) ;;
    *) export PATH="$_e_prefix/bin:$PATH" ;;
esac
[ "$_e_prefix" != "$_e_folder/.venv" ] || export VIRTUAL_ENV="$_e_prefix"

if [ "${BASH_SOURCE-}" = "$0" ]; then
    exec "$@"
fi
unset _e_file _e_link _e_folder _e_prefix
