#!/bin/sh
# Make this machine able to run the tasks: Debian packages of pipeline/host-packages.txt, Python packages in .venv.
# Does nothing, quickly, when all is there. LVSFORGE_WHEELS=DIR takes the Python packages from a folder (no network).
set -eu
cd "$(dirname "$0")/.."

wanted=$(sed 's/#.*//' pipeline/host-packages.txt | tr -s ' \n' ' ')
missing=""
for package in $wanted; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) || status=""
    [ "$status" = "install ok installed" ] || missing="$missing $package"
done
# shellcheck disable=SC2016  # apt-get expands $(ORIGIN), not the shell
if [ -n "$missing" ]; then
    echo "installing:$missing" >&2
    as_root=""
    if [ "$(id -u)" != 0 ]; then
        as_root=sudo
        command -v sudo >/dev/null || {
            echo "✗ root is needed to install:$missing" >&2
            echo "  → su -c 'apt-get update && apt-get install -y$missing'" >&2
            exit 1
        }
    fi
    # shellcheck disable=SC2086  # lists of package names
    {
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2 || {
            echo "✗ apt-get could not update its package lists" >&2
            echo "  → look at the messages above, and at /etc/apt/sources.list and sources.list.d" >&2
            exit 1
        }
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $missing >&2 || {
            echo "✗ apt-get could not install:$missing" >&2
            echo "  → look at the messages above; these packages are in Debian 12 (bookworm) main" >&2
            exit 1
        }
    }
# The build roots are made from apt's package lists, which a machine fresh from its installer does not have yet.
elif [ -z "$(apt-get indextargets --format '$(ORIGIN)' 'Created-By: Packages' 2>/dev/null)" ]; then
    if [ "$(id -u)" = 0 ]; then apt-get update -q >&2; fi
fi

python=$(command -v python3.11 || command -v python3) || {
    echo "✗ python3 is not installed" >&2
    echo "  → apt-get install python3 python3-venv" >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "✗ $python is older than Python 3.11" >&2
    echo "  → apt-get install python3.11 python3.11-venv" >&2
    exit 1
}
stamp=$(cat requirements.txt requirements-dev.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/lvsforge-stamp 2>/dev/null || true)" != "$stamp" ]; then
    echo "installing the Python packages into .venv" >&2
    "$python" -m venv .venv
    from=""
    [ -z "${LVSFORGE_WHEELS:-}" ] || from="--no-index --find-links $LVSFORGE_WHEELS"
    # shellcheck disable=SC2086  # options
    .venv/bin/pip install --quiet --disable-pip-version-check $from -r requirements-dev.txt >&2
    echo "$stamp" >.venv/lvsforge-stamp
fi
