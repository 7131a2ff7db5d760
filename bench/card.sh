#!/bin/bash
# Ten minutes of a GPU, well spent. Run from the repository's root, with the drawings' file of
# ~/.cache/reifusion/mini (sprites-….zip) in the folder that the second argument names.
#
#   bash bench/card.sh trial SPRITES OUT            # two minutes: does all of it run here? Steps a second, a sheet, tests
#   bash bench/card.sh train SPRITES OUT MINUTES    # the mini from nothing; more arguments are overrides, as start=FILE
#
# OUT gets the log, the losses, a sheet of each minute (run.tar), and the model in parts of 16 MiB: cat w? > mini.safetensors
# What the compiler made in the trial is found again by the training, if both run on one machine.
set -u
what=$1 sprites=$2 out=$3
export REIFUSION_CACHE=/tmp/reifusion-cache TORCHINDUCTOR_CACHE_DIR=/tmp/reifusion-inductor PYTHONUNBUFFERED=1
mkdir -p "$out" $REIFUSION_CACHE/mini && cp "$sprites"/sprites-*.zip $REIFUSION_CACHE/mini/
begun=$(date +%s)

if [ "$what" = trial ]; then
  runs=/tmp/reifusion-trial
  timeout 150 python3 -m reifusion.train mini minutes=none steps=200 scenes=8000 folder=$runs \
    checkpoint_minutes=30 dtype=bf16 > "$out/train.log" 2>&1
  echo "training: exit code $? after $(($(date +%s) - begun)) s"
  timeout 60 python3 -m pytest -q --no-header -p no:cacheprovider -m gpu tests > "$out/tests.log" 2>&1
  echo "tests: exit code $?"; tail -n 12 "$out/tests.log" | cut -c1-160
else
  runs=/tmp/reifusion-run minutes=$4
  # The same command goes on where it was stopped, with its clock.
  for try in 1 2; do
    python3 -m reifusion.train mini --minutes "$minutes" folder=$runs dtype=bf16 "${@:5}" \
      >> "$out/train.log" 2>&1 && break
  done
  echo "training: exit code $? after $(($(date +%s) - begun)) s"
fi

tr '\r' '\n' < "$out/train.log" | grep -v '^$' | cut -c1-200 | tail -n 8
for name in mini-vae mini; do
  [ -e $runs/$name/training.jsonl ] && tail -n 2 $runs/$name/training.jsonl
done
OUT=$out RUNS=$runs python3 - <<'PYTHON'
import glob, os, tarfile
from PIL import Image
out, runs = os.environ["OUT"], os.environ["RUNS"]
with tarfile.open(f"{out}/run.tar", "w") as tar:
    for sheet in sorted(glob.glob(f"{runs}/*/sheet-*.png")):
        picture = f"{sheet[:-4]}.jpg"
        Image.open(sheet).save(picture, quality=88)
        tar.add(picture, os.path.relpath(picture, runs))
    for name in [*glob.glob(f"{runs}/*/*.jsonl"), *glob.glob(f"{runs}/*/vocabulary.txt")]:
        tar.add(name, os.path.relpath(name, runs))
model, part = f"{runs}/mini/mini.safetensors", 16 * 2**20 - 1024
kept = f"{runs}/mini/checkpoint.pt"
if not os.path.exists(model) and os.path.exists(kept) and "trial" not in runs:
    # The run did not end well: what it had learned by its last checkpoint, without the words and the VAE.
    import torch
    from safetensors.torch import save_file
    average = torch.load(kept, map_location="cpu", weights_only=True)["ema"]
    save_file({name: x.bfloat16().contiguous() for name, x in average.items()}, model)
if os.path.exists(model) and "trial" not in runs:
    data = open(model, "rb").read()
    for k in range(0, len(data), part):
        open(f"{out}/w{k // part}", "wb").write(data[k : k + part])
    print("saved", len(data), "bytes")
PYTHON
