#!/bin/bash
# Ten minutes of a GPU, well spent. Run from the repository's root, with the drawings' file of
# ~/.cache/reifusion/mini (sprites-….zip) in the folder that the second argument names.
#
#   bash bench/card.sh trial SPRITES OUT            # two minutes: does all of it run here? Steps a second, a sheet, tests
#   bash bench/card.sh train SPRITES OUT MINUTES    # the mini from nothing; more arguments are overrides, as start=FILE
#
# OUT gets the log, the losses, a sheet of each minute (run.tar), and the model in parts of 16 MiB: cat w? > mini.safetensors
# What the compiler made in the trial is found again by the training, if both run on one machine.
# Half a minute after MINUTES at the latest, what there is by then is packed.
set -u
what=$1 sprites=$2 out=$3 tmp=${TMPDIR:-/tmp}
export REIFUSION_CACHE=$tmp/reifusion-cache TORCHINDUCTOR_CACHE_DIR=$tmp/reifusion-inductor PYTHONUNBUFFERED=1
begun=$(date +%s)
mkdir -p "$out" "$REIFUSION_CACHE/mini" && cp "$sprites"/sprites-*.zip "$REIFUSION_CACHE/mini/"

if [ "$what" = trial ]; then
  runs=$tmp/reifusion-trial
  timeout -k 10 150 python3 -m reifusion.train mini minutes=none steps=200 scenes=8000 folder="$runs" \
    checkpoint_minutes=30 dtype=bf16 > "$out/train.log" 2>&1
  echo "training: exit code $? after $(($(date +%s) - begun)) s"
  # Only these have tests for a GPU; others want packages that a card's machine may lack.
  timeout -k 5 60 python3 -m pytest -vv --no-header -p no:cacheprovider -m gpu tests/kernels tests/train/test_faster.py \
    > "$out/tests.log" 2>&1
  echo "tests: exit code $?"; tail -n 12 "$out/tests.log" | cut -c1-160
else
  runs=$tmp/reifusion-run minutes=$4
  ends=$((begun + $(python3 -c "print(round(60 * $minutes + 30))")))
  # The same command goes on where it was stopped, with its clock; the second time without what may have failed.
  for how in compile=true compile=false; do
    left=$((ends - $(date +%s)))
    [ $left -gt 10 ] || break
    timeout --foreground -k 10 $left python3 -m reifusion.train mini --minutes "$minutes" folder="$runs" dtype=bf16 $how "${@:5}" \
      >> "$out/train.log" 2>&1
    code=$?
    echo "training, $how: exit code $code after $(($(date +%s) - begun)) s"
    [ $code = 0 ] && break
  done
fi

tr '\r' '\n' < "$out/train.log" | grep -v '^$' | cut -c1-200 | tail -n 8
for name in mini-vae mini; do
  [ -e "$runs/$name/training.jsonl" ] && tail -n 2 "$runs/$name/training.jsonl"
done
WHAT=$what OUT=$out RUNS=$runs python3 - <<'PYTHON'
import glob, os, tarfile
from PIL import Image
what, out, runs = os.environ["WHAT"], os.environ["OUT"], os.environ["RUNS"]
model, part = f"{runs}/mini/mini.safetensors", 16 * 2**20 - 1024
vae, kept = f"{runs}/mini-vae/vae.safetensors", f"{runs}/mini/checkpoint.pt"
if what == "train" and not os.path.exists(model) and (os.path.exists(vae) or os.path.exists(kept)):
    # The run did not end well: its VAE, and what had been learned by the last checkpoint. The words are in run.tar.
    import torch
    from safetensors.torch import load_file, save_file
    found = load_file(vae) if os.path.exists(vae) else {}
    if os.path.exists(kept):
        found |= torch.load(kept, map_location="cpu", weights_only=True)["ema"]
    os.makedirs(os.path.dirname(model), exist_ok=True)
    save_file({name: x.bfloat16().contiguous() for name, x in found.items()}, model)
if what == "train" and os.path.exists(model):
    data = open(model, "rb").read()
    for k in range(0, len(data), part):
        open(f"{out}/w{k // part}", "wb").write(data[k : k + part])
    print("saved", len(data), "bytes")
with tarfile.open(f"{out}/run.tar", "w") as tar:
    for name in [*glob.glob(f"{runs}/*/*.jsonl"), *glob.glob(f"{runs}/*/vocabulary.txt")]:
        tar.add(name, os.path.relpath(name, runs))
    for sheet in sorted(glob.glob(f"{runs}/*/sheet-*.png")):
        picture = f"{sheet[:-4]}.jpg"
        Image.open(sheet).save(picture, quality=88)
        tar.add(picture, os.path.relpath(picture, runs))
PYTHON
