"""The afternoon's path through the code: each file with its lines, and the minutes that they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Stop:
    files: tuple[str, ...]
    look_for: str
    chapters: tuple[str, ...]
    pace: int = 12  # lines per minute: 12 where there are equations, more where the code is plain

    def lines(self) -> int:
        return sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in self.files)

    def minutes(self) -> int:
        return max(5, round(self.lines() / self.pace / 5) * 5)


M = "reifusion/model/"
PATH = (
    Stop((f"{M}config.py",),
         "every size of SD 1.5, on one screen, and of the model that <code>reifusion train mini</code> makes "
         "(the mini that ships is older: <code>reifusion.load().config</code>)", ("big-picture",), 20),
    Stop((f"{M}pipeline.py", f"{M}step.py", f"{M}guidance.py", f"{M}request.py"),
         "<code>generate</code> and <code>denoise</code>: the four stages from words to pixels; where the "
         "halves of guidance meet",
         ("big-picture", "guidance"), 20),
    Stop((f"{M}noise.py", f"{M}ddpm.py"),
         "the noise schedule; <code>add_noise</code>; the mean and the variance of the step back",
         ("forward", "reverse")),
    Stop((f"{M}attention.py",), "the written-out softmax beside the fused kernel", ("attention",)),
    Stop((f"{M}diffusion.py",),
         "<code>plan</code>, the U as a list; then <code>UNet.walk</code>, which follows it", ("unet",)),
    Stop((f"{M}tokenizer.py", f"{M}clip.py"), "bytes to pieces to vectors", ("words",), 16),
    Stop((f"{M}encoder.py", f"{M}decoder.py"),
         "the reparameterisation; the scale factor, applied by one function and undone by another", ("vae",)),
    Stop((f"{M}samplers.py", f"{M}flow.py"),
         "one step each: DDIM, Euler, Heun, DPM-Solver++; and rectified flow",
         ("samplers", "flow")),
    Stop((f"{M}model_converter.py", f"{M}model_loader.py", f"{M}tensors.py"),
         "the table of names; how a file of unknown format is read safely", ("checkpoints",), 30),
)  # fmt: skip
LATER = {
    "model/pictures.py": "anything that holds a picture becomes a tensor, and back",
    "model/inpaint.py": "beginning with a picture: image-to-image, editing, inpainting",
    "model/further_samplers.py": "more samplers: PLMS, LMS, UniPC, DPM++ 2M SDE, LCM",
    "model/tuning.py": "which sampler, schedule and options go together",
    "model/spacing.py": "which timesteps a sampler visits",
    "model/other_betas.py": "forward processes other than Stable Diffusion's",
    "model/words.py": "how a prompt is cut into words",
    "model/tokenizer_folder.py": "a tokenizer in the files of transformers",
    "model/ask.py": "a request in the words of the first version, too",
    "model/asked.py": "the types of settings, for type checkers",
    "model/turns.py": "vectors in place of words, in each turn of the loop",
    "model/limits.py": "single values, checked",
    "model/sentences.py": "values in messages",
    "model/prompts.py": "syntax of other programs in prompts",
    "model/first_call.py": "<code>generate</code> as a single function with a dict of networks",
    "model/diffusers_folder.py": "the configs and files of a diffusers folder",
    "model/prediction.py": "how it is known what a U-Net predicts",
    "model/family.py": "how the files of a family of models are recognised",
    "model/part.py": "a VAE or a U-Net from a file of its own",
    "model/modes.py": "a network with derivatives, or at full speed; and decoded once more in float32",
    "model/about.py": "a model in three lines",
    "model/finite.py": "which part made numbers that are not finite, and why",
    "api.py": "<code>load</code> and <code>generate</code>, the way in",
    "kernels/fast.py": "faster forms of the layers, installed after loading",
    "kernels/halves.py": "the part of the U that both halves of guidance share",
    "kernels/native.py": "our own attention kernel, in C",
    "kernels/training.py": "attention in training, on a CPU",
    "kernels/bands.py": "the decoder in bands, for little memory",
    "swap.py": "the one way in which a module is replaced, and put back",
    "weights/lora.py": "what a LoRA adds, and takes away again",
    "weights/lora_kinds.py": "its relatives: LoHa, LoKr, DoRA, differences",
    "weights/lora_blocks.py": "how much of it goes into each block",
    "families/lcm.py": "latent consistency models",
    "families/pix2pix.py": "models that edit a picture by words",
    "families/pooled_text.py": "a text encoder that gives a vector for the whole text too",
    "families/sdxl_unet.py": "Stable Diffusion XL's U-Net, which is told sizes",
    "families/sdxl.py": "Stable Diffusion XL: two text encoders, a refiner, and the pipeline",
    "families/bk_sdm.py": "U-Nets that lost blocks",
    "families/sd3.py": "Stable Diffusion 3: three text encoders, and the pipeline",
    "families/mmdit.py": "its transformer: words and pixels at one table",
    "families/t5.py": "the encoder of long texts",
    "families/unigram.py": "SentencePiece's tokens, by Viterbi's algorithm",
    "families/flow_solver.py": "DPM-Solver++ for rectified flow",
    "sampling/solver.py": "what the samplers of other programs share",
    "sampling/multistep.py": "DPM++ 2M and 3M SDE, DEIS, IPNDM, ER SDE",
    "sampling/schedules.py": "which noise levels to visit, as in other programs",
    "steer/controlnet.py": "a second network that tells the U-Net where things are",
    "steer/clip_vision.py": "CLIP's other half: a picture becomes vectors",
    "steer/ip_adapter.py": "a picture as a prompt, beside the words",
    "shortcuts/deepcache.py": "some steps skip the deep rows of the U",
    "shortcuts/int8.py": "weights in eight bits",
}


def left_out() -> list[str]:
    """Returns the files of the model that neither the path nor the list after it names."""
    named = {file for stop in PATH for file in stop.files} | {f"reifusion/{file}" for file in LATER}
    return sorted(path.name for path in (ROOT / M).glob("[!_]*.py") if f"{M}{path.name}" not in named)


def _link(file: str) -> str:
    if not (ROOT / file).is_file():
        raise FileNotFoundError(f"the reading order names {file}, which is not there")
    return f'<a href="source/{file}.html"><code>{file.removeprefix("reifusion/")}</code></a>'


def table() -> str:
    """Returns the path as an HTML table. Raises FileNotFoundError for a file or chapter that is missing."""
    from docs.equations import chapters

    numbers = {name.removesuffix(".md"): number for name, number in chapters().items()}
    rows = []
    for stop in PATH:
        there = ", ".join(f'<a href="book/{name}.html">{numbers[name]}</a>' for name in stop.chapters)
        files = " ".join(map(_link, stop.files))
        cells = (stop.minutes(), stop.lines(), files, stop.look_for, there)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("minutes", "lines", "file", "look for", "chapter"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def later() -> str:
    items = "".join(f"<li>{_link('reifusion/' + name)}: {what}</li>" for name, what in LATER.items())
    return f"<ul>{items}</ul>"


def total() -> str:
    minutes, lines = sum(stop.minutes() for stop in PATH), sum(stop.lines() for stop in PATH)
    return f"{minutes // 60} hours and {minutes % 60} minutes for {lines:,} lines"
