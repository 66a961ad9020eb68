# Sourced by run1.sh and run2.sh in the repository root of a GPU machine without a network. Doing it again costs
# nothing new. Gives OUT, the folder whose files come back, and FAP_KIT, where the uploads are put together: the
# second upload's command does not have the first upload beside it any more.
export PYTHONUNBUFFERED=1
export OUT=${OUT:-/tmp/out}
export FAP_KIT=${FAP_KIT:-/tmp/kit}
mkdir -p "$OUT" "$FAP_KIT"

whole() { (cd "$FAP_KIT" && sha256sum --check --quiet "$1" 2>&1 | head -n 5); }

receive() { # FOLDER SUMS: copies an upload that is here into the kit and says whether all of it arrived
    if [ -d "$1" ] && ! { cmp -s "$1/$2" "$FAP_KIT/$2" && whole "$2" >/dev/null; }; then
        # the script that is running may be replaced: a new file, so that the shell goes on reading the old one
        cp -r --remove-destination "$1/." "$FAP_KIT/"
    fi
    if [ ! -f "$FAP_KIT/$2" ]; then
        echo "SETUP: the upload $1 is not here"
    elif ! whole "$2"; then
        echo "SETUP FAILED: the upload $1 is damaged (files above); make kit, and upload it again"
    fi
}
receive .gpu first.sha256
receive .gpu2 second.sha256
if [ -f "$FAP_KIT/commit" ]; then export FAP_COMMIT=$(cat "$FAP_KIT/commit"); fi

# Wheels of pure files are archives: no pip is needed, and the machine's own packages stay as they are.
for wheel in "$FAP_KIT"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$FAP_KIT/site" || echo "SETUP FAILED: $wheel cannot be unpacked"
done
export PYTHONPATH=$PWD:$FAP_KIT/site
mkdir -p data/photos
cp "$FAP_KIT"/photos/*.whl data/photos/ || echo "SETUP FAILED: no photos: the loaders cannot be measured"

python3 -m bench.gpu.imports || echo "SETUP: going on without the modules above"

measure() { # NAME COMMAND...: the command with --out; $OUT gets NAME.tgz of all it wrote, its tables and what it said
    local name=$1 status=0
    local results=$FAP_KIT/results/$name
    shift
    rm -rf "$results"
    mkdir -p "$results"
    pack() { # each file at once, whenever the machine may be taken away
        tar czf "$results.tgz" -C "$results" . && mv "$results.tgz" "$OUT/$name.tgz"
        cp "$results"/*.md "$OUT/" 2>/dev/null || true
    }
    while sleep "${FAP_PACK_SECONDS:-10}" && kill -0 $$; do pack; done >/dev/null 2>&1 &
    local packer=$!
    "$@" --out "$results" 2>&1 | tee "$OUT/$name.log" || status=$?
    kill "$packer"
    pack
    echo "$name: exit status $status; results in $OUT"
    return "$status"
}
