"""A picture's settings: their names, defaults and help, and their forms as text, metadata, shell and Python.

Everything that draws begins here. The command line makes `Settings` of texts, the album writes them into
pictures and reads them back, and `request` and `pipe` make ready what draws. The limits of a setting are
checked in `model/request.py`. Functions that need PyTorch import it, and this file does not, so that `--help`
answers at once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .model.sentences import shown
from .spelling import (
    Control,
    ImagePrompt,
    LoRA,
    carried_interval,
    carried_number,
    carried_rows,
    carried_sides,
    carried_size,
    read_control,
    read_embedding,
    read_image_prompt,
    read_interval,
    read_lora,
    read_prediction,
    read_sides,
    read_size,
    write_control,
    write_embedding,
    write_image_prompt,
    write_lora,
    write_sides,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from .model.config import ModelConfig
    from .model.pictures import Picture
    from .model.pipeline import StableDiffusion, Step
    from .model.request import Request
    from .steer.manners import Manner


def sampler_names() -> list[str]:
    """Returns the names of the samplers, read from their source, as importing it would import PyTorch."""
    return _named(
        r'^    name, title = "(\w+)"',
        "model/ddpm.py", "model/*samplers.py", "model/flow.py", "families/flow_solver.py", "sampling/*.py",
    )  # fmt: skip


def schedule_names() -> list[str]:
    """Returns the names of the schedules, read in the same way."""
    return _named(r'^@schedule\("(\w+)"', "sampling/schedules.py")


def _named(pattern: str, *files: str) -> list[str]:
    paths = (path for file in files for path in sorted(Path(__file__).parent.glob(file)))
    return re.findall(pattern, "\n".join(path.read_text("utf-8") for path in paths), re.MULTILINE)


# ---- the settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """One setting, apart from its value."""

    title: str  # as other programs and the studio name it
    help: str
    default: Any
    shown: str  # the default in words, or ""
    kind: type  # on a command line: str, int, float, bool, or list for an option that may be repeated
    read: Callable[[Any], Any]  # a command line's form -> the value; of a list, one of its values
    write: Callable[[Any], str]  # the value -> text; the same
    carried: Callable[[Any], Any]  # metadata, JSON -> the value; ValueError for a wrong type

    def parse(self, given: Any) -> Any:
        """Reads what a command line gives: a text or a number, or for a list several texts."""
        return tuple(map(self.read, given)) if self.kind is list else self.read(given)


def _setting(
    title: str,
    help: str,
    default: Any = None,
    *,
    kind: type = str,
    shown: str | None = None,
    read: Callable[[Any], Any] = lambda value: value,
    write: Callable[[Any], str] = str,
    carried: Callable[[Any], Any] | None = None,
) -> Any:
    def of_kind(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        raise ValueError

    if shown is None:
        shown = str(default) if default else ""
    about = About(title, help, default, shown, kind, read, write, carried or of_kind)
    return field(default=default, metadata={"about": about})


_MODEL = "the model's"


@dataclass(frozen=True)
class Settings:
    """Everything that decides one picture. None leaves a setting to the model, or switches it off."""

    prompt: str | None = _setting("Prompt", "What to draw.")
    negative: str = _setting("Negative prompt", "What to keep away from.", "")
    model: str = _setting("Model", "A .safetensors or .ckpt file, a diffusers folder, or owner/name.", "mini")
    lora: tuple[LoRA, ...] = _setting(
        "LoRA", "A LoRA, as file, file:weight or file:weight:lbw=blocks; can be given several times.",
        (), kind=list,
        read=read_lora, write=write_lora, carried=carried_rows((str, float), (str, float, str)),
    )  # fmt: skip
    embedding: tuple[tuple[str, str], ...] = _setting(
        "Embedding", "A learned word, as file or file:word; can be given several times.", (), kind=list,
        read=read_embedding, write=write_embedding, carried=carried_rows((str, str)),
    )  # fmt: skip
    sampler: str | None = _setting("Sampler", f"One of {', '.join(sampler_names())}.", shown=_MODEL)
    steps: int | None = _setting("Steps", "1 to 1000.", kind=int, shown=_MODEL)
    cfg: float | None = _setting(
        "CFG scale", "How closely to follow the prompt; 1 is no guidance, and twice as fast.",
        kind=float, shown=_MODEL, carried=carried_number,
    )  # fmt: skip
    seed: int | None = _setting("Seed", "The same seed gives the same picture.", kind=int, shown="a new one")
    size: tuple[int, int] | None = _setting(
        "Size", "Width x height, like 512x768.", shown=_MODEL,
        read=read_size, write=lambda size: "x".join(map(str, size)), carried=carried_size,
    )  # fmt: skip
    init_image: str | None = _setting("Init image", "Begin with this picture.")
    mask: str | None = _setting("Mask", "Redraw the init image only where this one is white.")
    strength: float = _setting(
        "Denoising strength", "How much of the init image may change, to 1.", 0.8,
        kind=float, carried=carried_number,
    )  # fmt: skip
    clip_skip: int = _setting("Clip skip", "Layers of the text encoder to leave out.", 0, kind=int, shown="0")
    guidance_interval: tuple[float, float] | None = _setting(
        "Guidance interval", "Guidance only at noise from:to, like 0.3:5; other steps take half the time.",
        read=read_interval, write=lambda ends: ":".join(map(str, ends)), carried=carried_interval,
    )  # fmt: skip
    guidance_rescale: float = _setting(
        "Guidance rescale", "How much of the contrast that guidance adds is taken back, to 1.", 0.0,
        kind=float, shown="0", carried=carried_number,
    )  # fmt: skip
    image_guidance: float | None = _setting(
        "Image CFG scale", "How closely models that edit pictures follow the init image.",
        kind=float, shown="1.5", carried=carried_number,
    )  # fmt: skip
    deepcache: int = _setting("DeepCache", "The U-Net's inside on every n-th step only.", 1, kind=int)
    int8: bool = _setting("8-bit weights", "Weights of 8 bits.", False, kind=bool)
    fp8: bool = _setting("FP8 weight", "Weights kept in 8-bit floating point.", False, kind=bool)
    dtype: str | None = _setting("dtype", "bf16, fp16 or fp32.", shown="what suits the device")
    vae: str | None = _setting("VAE", "A VAE for the model: a file, a folder, or owner/name.", shown=_MODEL)
    unet: str | None = _setting(
        "U-Net", "A U-Net for the model: a file, a folder, or owner/name.", shown=_MODEL
    )
    refiner: str | None = _setting(
        "Refiner", "SDXL's refiner, for the last fifth of the way: a file, a folder, or owner/name."
    )
    prediction_type: str | None = _setting(
        "Prediction type", "What the U-Net predicts: epsilon, v_prediction or flow.", shown=_MODEL,
        read=read_prediction,
    )  # fmt: skip
    code: str | None = _setting("Code", "A Python file with samplers or schedules of your own; it is run.")
    hires: float = _setting(
        "Hires upscale", "Draw it once more so many times as large, 1 to 4.", 1.0, kind=float, shown="1",
        carried=carried_number,
    )  # fmt: skip
    hires_strength: float = _setting(
        "Hires strength", "How much of it the larger drawing may change, to 1.", 0.5, kind=float,
        carried=carried_number,
    )  # fmt: skip
    hires_by: str = _setting(
        "Hires upscaler",
        "What is enlarged: lanczos (the picture), or latents: latent (bicubic, antialiased), latent-bicubic, "
        "latent-bilinear, latent-bilinear-antialiased, latent-nearest, latent-nearest-exact.",
        "lanczos",
    )

    emphasis: str | None = _setting(
        "Emphasis", "Reads (word:1.3), BREAK, [a:b:0.5], AND, by a rule: a1111, plain, comfyui or compel.",
        shown="brackets are text",
    )  # fmt: skip
    schedule: str | None = _setting(
        "Schedule type", f"One of {', '.join(schedule_names())}.", shown="the sampler's"
    )
    eta: float | None = _setting(
        "Eta", "How much of a step is fresh noise, 0 to 1, of samplers that let you choose.",
        kind=float, shown="the sampler's", carried=carried_number,
    )  # fmt: skip
    s_noise: float | None = _setting(
        "Sigma noise", "A factor of the noise that a sampler adds.", kind=float, shown="1",
        carried=carried_number,
    )  # fmt: skip
    churn: float | None = _setting(
        "Sigma churn", "How far euler_churn goes back up, in all.", kind=float, shown="5",
        carried=carried_number,
    )  # fmt: skip
    control: tuple[Control, ...] = _setting(
        "ControlNet", "A ControlNet and its hint, as net=picture, net=picture:weight or"
        " net=picture:weight:from-to; can be given several times.", (), kind=list,
        read=read_control, write=write_control, carried=carried_rows((str, str, float, float, float)),
    )  # fmt: skip
    control_mode: str = _setting(
        "Control mode", "balanced, guess (works without a prompt), or what counts more: prompt or control.",
        "balanced",
    )  # fmt: skip
    ip_adapter: tuple[ImagePrompt, ...] = _setting(
        "IP-Adapter", "An IP-Adapter and a picture to prompt with, as adapter=picture or"
        " adapter=picture:weight; can be given several times.", (), kind=list,
        read=read_image_prompt, write=write_image_prompt, carried=carried_rows((str, str, float)),
    )  # fmt: skip
    image_encoder: str | None = _setting(
        "Image encoder", "The folder of the image encoder of IP-Adapters.", shown="the one beside the adapter"
    )
    manner: str | None = _setting(
        "Manner", "Draw as this program does, and read its names: diffusers, a1111, comfyui or sdcpp.",
        shown="reifusion's",
    )  # fmt: skip
    rng: str | None = _setting(
        "RNG", "Where noise comes from: cpu, philox (as a CUDA device), comfyui, comfyui-cpu or invokeai.",
        shown="the manner's, or cpu",
    )  # fmt: skip
    variation: float = _setting(
        "Variation seed strength", "How far noise is on the way to that of --variation-seed, 0 to 1.", 0.0,
        kind=float, shown="0", carried=carried_number,
    )  # fmt: skip
    variation_seed: int = _setting(
        "Variation seed", "With --variation, this seed counts up, and --seed stays.", 0, kind=int, shown="0"
    )
    ensd: int = _setting(
        "ENSD", "The noise in the steps is that of a seed so much higher, as A1111's eta noise seed delta.",
        0, kind=int, shown="0",
    )  # fmt: skip
    mask_blur: float = _setting(
        "Mask blur", "Softens the mask's edge by so many pixels.", 0.0, kind=float, shown="0",
        carried=carried_number,
    )  # fmt: skip
    only_masked: int | None = _setting(
        "Masked area padding", "Draw only the masked part, at --size, with so many pixels around it.",
        kind=int, shown="the whole picture",
    )  # fmt: skip
    outpaint: tuple[int, int, int, int] | None = _setting(
        "Outpaint", "Continue the init image beyond its border, like right=128,top=64.",
        read=read_sides, write=write_sides, carried=carried_sides,
    )  # fmt: skip

    ema: bool = _setting(
        "EMA weights",
        "The moving averages of the U-Net's weights, of a file that has both.",
        False,
        kind=bool,
    )

    def there(self) -> Manner:
        """Returns what the program does in whose manner the picture is drawn. ValueError for no such one."""
        from .steer import manners

        manners.check(self.manner, self.rng, self.sampler)
        manner = manners.MANNERS.get(self.manner or "", manners.Manner())
        if self.emphasis is not None:  # a rule of one's own, in the language that goes with all of them
            manner = replace(manner, emphasis=self.emphasis, language="a1111")
        return replace(manner, rng=self.rng or manner.rng)

    def nth(self, seed: int, k: int) -> Settings:
        """Returns the settings of picture k of several: the seed, or else that of variations, is k more.

        Raises ValueError where there are no more seeds.
        """
        from .model.limits import whole_number

        name, first = ("variation_seed", self.variation_seed) if self.variation else ("seed", seed)
        counted = whole_number(first + k, f"the {name} of picture {k + 1}", 0, 2**63 - 1)
        changed: dict[str, Any] = {"seed": seed, name: counted}
        return replace(self, **changed)

    def request(self, num: int = 1) -> Request:
        """Returns the request to the model. Raises ValueError, in one sentence, for what cannot be drawn."""
        from . import sampling  # noqa: F401  # adds its samplers
        from .model.limits import whole_number
        from .model.pictures import read_picture
        from .model.request import Request
        from .steer import manners, variations

        if self.prompt is None:
            raise ValueError('say what to draw, as in: reifusion generate "a cat"')
        settings = {name: getattr(self, name) for name in requested()}
        settings["negative"] = self.negative or None  # an empty text is none, as SDXL has to know
        for name in ("init_image", "mask"):
            path = getattr(self, name)
            settings[name] = None if path is None else read_picture(path)
        manner = self.there()
        settings |= self._inpainted(settings)
        if self.init_image is not None and self.steps is not None and 0 < self.strength <= 1:
            manners.STEPS[manner.img2img](self.steps, self.strength)  # more than there are, perhaps
        if settings["size"] is not None:
            settings["size"] = manners.rounded(settings["size"], manner)
        if self.sampler is not None:
            named = manners.sampled(self.sampler, self.schedule, manner)
            settings["sampler"], settings["schedule"] = named
        variations.check(self.variation)
        whole_number(self.variation_seed, "variation_seed", 0, 2**63 - 1)
        whole_number(self.ensd, "ensd", 0, 2**32 - 1)
        if self.hires != 1:
            from .steer import hires

            hires.check(self.hires, self.hires_strength, self.hires_by)
        if manner.emphasis is not None:
            from .steer import emphasis

            emphasis.check(manner.emphasis, self.prompt, self.negative, language=manner.language)
        if self.control:
            from .steer import controlnet

            if self.deepcache != 1:
                raise ValueError("a ControlNet steers the inside of the U-Net, which --deepcache leaves out")
            for _, hint, weight, start, end in self.control:
                controlnet.check(weight, start, end, self.control_mode)
                read_picture(hint)
        if self.image_encoder and not self.ip_adapter:
            raise ValueError("an image encoder is for --ip-adapter, and there is none")
        if self.ip_adapter and self.deepcache != 1:
            raise ValueError("an IP-Adapter works inside the U-Net, which --deepcache leaves out")
        for _, picture, _ in self.ip_adapter:
            read_picture(picture)
        return Request(**settings, num=num)

    def _inpainted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the init image, mask and size for outpainting and with soft edges, where they are asked."""
        from .model.pictures import open_both, open_picture
        from .steer import masks, outpaint

        masks.check(self.mask_blur, self.only_masked)
        picture, mask, size = given["init_image"], given["mask"], given["size"]
        if self.outpaint is not None:
            outpaint.check(self.outpaint)
            if picture is None or mask is not None:
                raise ValueError("outpaint needs an init image, and no mask: it makes one")
            picture, mask = outpaint.larger(open_picture(picture), self.outpaint, self.mask_blur)
            if size not in (None, picture.size):
                raise ValueError("with outpaint, the size follows from the init image; leave it out")
            size = picture.size
        if mask is None:
            if self.mask_blur or self.only_masked is not None:
                raise ValueError("mask_blur and only_masked need a mask")
            return {}
        picture, mask = open_both(picture, mask)
        mask = masks.blurred(cast("Image", mask), self.mask_blur)
        if self.only_masked is not None:
            masks.region(mask, 0, (1, 1))
        return {"init_image": picture, "mask": mask, "size": size}

    def pipe(
        self,
        device: torch.device | str | None = None,
        compile: bool = False,
        idle_device: torch.device | str | None = None,
    ) -> StableDiffusion:
        """Loads the model, with LoRAs, shortcuts and what steers it.

        Raises ValueError, in one sentence, for a wrong file.
        """
        return self.steered(self.loaded(device, compile, idle_device), {})

    def loaded(
        self,
        device: torch.device | str | None = None,
        compile: bool = False,
        idle_device: torch.device | str | None = None,
    ) -> StableDiffusion:
        """Loads the model with its LoRAs. Raises ValueError, in one sentence, for a wrong file."""
        from .api import load
        from .families.sdxl import with_refiner
        from .shortcuts.fp8 import store
        from .shortcuts.int8 import quantize
        from .weights import find
        from .weights.inversion import load_embedding, teach
        from .weights.lora import attach, load_lora

        loras = [(load_lora(find(file, "lora")), *rest) for file, *rest in self.lora]
        words = [load_embedding(find(file), word) for file, word in self.embedding]
        changed = self._changed() | ({"compile": True} if compile else {})
        pipe = load(self.model, device, self.dtype, idle_device=idle_device, **changed)
        for word in words:
            teach(pipe, word)
        for lora, weight, *blocks in loras:
            attach(pipe, lora, weight, blocks[0] if blocks else None)
        pipe = replace(pipe, config=self._as_loras_ask(pipe.config))
        refiner = load(self.refiner, device, self.dtype, idle_device=idle_device) if self.refiner else None
        for one in filter(None, (pipe, refiner)):
            if self.int8:
                quantize(one)
            if self.fp8:
                store(one)
        return pipe if refiner is None else with_refiner(pipe, refiner)

    def steered(self, pipe: StableDiffusion, known: dict[Any, Any]) -> StableDiffusion:
        """The same model with ControlNets, IP-Adapters and DeepCache, whose weights are not in the model.

        known: ControlNets and adapters that were read for this model before, by their files; what is read
        now is added. Raises ValueError, in one sentence, for a wrong file.
        """
        from .shortcuts.deepcache import deepcached

        if self.control:
            pipe = self._controlled(pipe, known)
        if self.ip_adapter:
            pipe = self._with_image_prompts(pipe, known)
        return deepcached(pipe, self.deepcache)

    def _with_image_prompts(self, pipe: StableDiffusion, known: dict[Any, Any]) -> StableDiffusion:
        from .steer.ip_adapter import ImagePrompt, with_image_prompts
        from .steer.ip_adapter_files import load_ip_adapter
        from .weights.hub import find_adapter

        prompts = []
        for file, picture, weight in self.ip_adapter:
            if (key := (file, self.image_encoder)) not in known:
                known[key] = load_ip_adapter(find_adapter(file), pipe, self.image_encoder)
            adapter, encoder = known[key]
            prompts.append(ImagePrompt(adapter, encoder, picture, weight))
        return with_image_prompts(pipe, *prompts)

    def _controlled(self, pipe: StableDiffusion, known: dict[Any, Any]) -> StableDiffusion:
        from .steer.control_files import load_control
        from .steer.controlnet import Control, controlled
        from .weights import find

        controls = []
        for file, hint, weight, start, end in self.control:
            if file not in known:
                known[file] = load_control(find(file, "control"), pipe)
            seen = self._seen(hint, pipe.config)
            controls.append(Control(known[file], seen, weight, start, end, self.control_mode))
        return controlled(pipe, *controls)

    def _seen(self, hint: str, config: ModelConfig) -> Picture:
        """The part of a hint that belongs to what is drawn: of the masked part alone, that part."""
        if self.only_masked is None:
            return hint
        from .model.pictures import fit, read_picture
        from .steer import masks

        request = self.completed(self.request(), config)
        mask = cast("Image", request.mask)
        box = masks.region(mask, self.only_masked, cast(Any, request.size))
        return masks.cut(fit(read_picture(hint), *mask.size), box)

    def draw(
        self,
        pipe: StableDiffusion,
        request: Request,
        progress: bool = False,
        callback: Callable[[Step], Any] | None = None,
        manner: Manner | None = None,
    ) -> Image:
        """Draws the one picture of a request, in one pass or in two, with weights or without.

        manner: what the program does in whose manner it is drawn; None: as these settings say.
        callback: as for `pipe.generate`.
        """
        from .steer import emphasis, hires, manners, masks, outpaint

        manner = manner or self.there()
        request = self.completed(request, pipe.config, manner)
        whole, box = request, None
        if manner != manners.Manner() or self.variation or self.ensd:
            request = manners.asked(request, manner, self.variation, self.variation_seed, self.ensd)
            pipe = manners.stepped(manners.cut(pipe) if manner.cut else pipe, manner)
        rule = manner.emphasis if self.emphasis is not None or emphasis.suits(pipe) else None
        if self.only_masked is not None:
            box = masks.region(cast("Image", request.mask), self.only_masked, cast(Any, request.size))
            request = masks.only(request, box)

        request = replace(request, clip_skip=manners.left_out(request.clip_skip, pipe.config, manner))

        def words(one: Request, before: int = 0) -> Request:
            one = manners.begun(pipe, one, manner)
            return one if rule is None else emphasis.request(pipe, one, rule, before, manner.language)

        if self.hires == 1 and rule is None:
            picture = cast("Image", pipe.generate(words(request), progress=progress, callback=callback))
        else:
            more = self.hires, self.hires_strength, self.hires_by
            (picture,) = hires.generate(
                pipe, request, *more, progress=progress, words=words, callback=callback,
                left=None if manner.again is None else manners.STEPS[manner.again],
            )  # fmt: skip
        if box is not None:
            picture = masks.put_back(whole, box, picture)
        if self.outpaint is not None:
            picture = outpaint.cut(picture, str(self.init_image), self.outpaint)
        return picture

    def completed(self, request: Request, config: ModelConfig, manner: Manner | None = None) -> Request:
        """Returns the request with the model's own for what is left open, as the program has that.

        So a picture, which carries it all, is the same when it is drawn again.
        """
        from .steer import manners

        manner, request = manner or self.there(), request.for_model(config)
        size, sampler, schedule = cast(Any, request.size), str(request.sampler), request.schedule
        if self.size is None:
            size = manners.rounded(size, manner)
        if self.sampler is None:
            sampler, schedule = manners.sampled(sampler, schedule, manner)
        return replace(request, size=size, sampler=sampler, schedule=schedule)

    def config(self) -> ModelConfig:
        """Finds the model's config, with what these settings change in it, long before it is loaded."""
        from .weights import Changes, find_config

        return self._as_loras_ask(find_config(self.model, Changes(**self._changed())))

    def _as_loras_ask(self, config: ModelConfig) -> ModelConfig:
        """Returns the config with the few steps that a LoRA may have been made for."""
        from .families.few_steps import by_name

        for file, *_ in self.lora:
            config = by_name(config, Path(file).stem)
        return config

    def _changed(self) -> dict[str, Any]:
        """Returns the settings that change what the model's file says, by name."""
        values = {name: getattr(self, name) for name in ("vae", "unet", "prediction_type", "ema")}
        return {name: value for name, value in values.items() if value not in (None, False)}

    def filled(self, request: Request) -> Settings:
        """Returns these settings, with the request's own in their place wherever it has some."""
        return replace(self, **of_request(request))

    def carried(self) -> dict[str, Any]:
        """Returns the settings as a picture carries them, ready for JSON; open ones are left out."""
        values = {name: getattr(self, name) for name in ABOUT}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def as_command(self) -> str:
        """Returns the line for a shell that draws the picture again."""
        words = ["reifusion", "generate"]
        for name, value in self._said().items():
            flag, write = f"--{name.replace('_', '-')}", ABOUT[name].write
            if ABOUT[name].kind is list:
                words += [f"{flag}={write(one)}" for one in value]
            elif name != "prompt":
                words.append(flag if value is True else f"{flag}={write(value)}")
        return shlex.join([*words, "--", self.prompt or ""])

    def as_python(self) -> str:
        """Returns the Python that draws the picture again."""
        if any(getattr(self, name) != ABOUT[name].default for name in BY_SETTINGS):
            return self._as_settings()
        changed = "".join(f", {name}={value!r}" for name, value in self._changed().items())
        imports = ["import reifusion"]
        pipe = [f"pipe = reifusion.load({self.model!r}, dtype={self.dtype!r}{changed})"]
        if self.embedding:
            imports.append("from reifusion.weights.inversion import load_embedding, teach")
            imports.append("from reifusion.weights import find")
            for file, word in self.embedding:
                pipe.append(f"teach(pipe, load_embedding(find({file!r}), {word!r}))")
        if self.lora:
            imports.append("from reifusion.weights.lora import attach")
            for file, weight, *blocks in self.lora:
                more = "".join(f", blocks={one!r}" for one in blocks)
                pipe.append(f"attach(pipe, {file!r}, {weight!r}{more})")
        loaded = ["pipe"]
        if self.refiner:
            loaded.append("refiner")
            pipe.append(f"refiner = reifusion.load({self.refiner!r}, dtype={self.dtype!r})")
        if self.int8:
            imports.append("from reifusion.shortcuts.int8 import quantize")
            pipe += [f"quantize({one})" for one in loaded]
        if self.fp8:
            imports.append("from reifusion.shortcuts.fp8 import store")
            pipe += [f"store({one})" for one in loaded]
        if self.refiner:
            imports.append("from reifusion.families.sdxl import with_refiner")
            pipe.append("pipe = with_refiner(pipe, refiner)")
        if self.control:
            imports += [
                "from reifusion.steer.controlnet import Control, controlled",
                "from reifusion.weights import find",
                "from reifusion.steer.control_files import load_control",
            ]
            pipe.append("pipe = controlled(pipe, *[")
            for file, *rest in self.control:
                given = ", ".join(map(repr, (*rest, self.control_mode)))
                pipe.append(f'    Control(load_control(find({file!r}, "control"), pipe), {given}),')
            pipe.append("])")
        if self.ip_adapter:
            imports += [
                "from reifusion.steer.ip_adapter import ImagePrompt, with_image_prompts",
                "from reifusion.weights.hub import find_adapter",
                "from reifusion.steer.ip_adapter_files import load_ip_adapter",
            ]
            pipe.append("pipe = with_image_prompts(pipe, *[")
            for file, picture, weight in self.ip_adapter:
                read = f"*load_ip_adapter(find_adapter({file!r}), pipe, {self.image_encoder!r})"
                pipe.append(f"    ImagePrompt({read}, {picture!r}, {weight!r}),")
            pipe.append("])")
        if self.code:
            imports.append("from reifusion.own import run_file")
            pipe.insert(0, f"run_file({self.code!r})")
        if self.deepcache != 1:
            imports.append("from reifusion.shortcuts.deepcache import deepcached")
            pipe.append(f"pipe = deepcached(pipe, {self.deepcache})")
        said = {
            name: value for name, value in self._said().items() if name in requested() and name != "prompt"
        }
        settings = [f"    {name}={value!r}," for name, value in said.items()]
        call = ["picture = pipe.generate(", f"    {self.prompt!r},", *settings, ")"]
        if self.hires != 1 or self.emphasis is not None:
            imports.append("from reifusion.steer import hires")
            own = [f"    {name}={value!r}," for name, value in said_of_hires(self)]
            if self.emphasis is not None:
                imports.append("from reifusion.steer import emphasis")
                own.append(
                    f"    words=lambda one, before: emphasis.request(pipe, one, {self.emphasis!r}, before),"
                )
            call = ["picture = hires.generate(", f"    pipe, {self.prompt!r},", *own, *settings, ")[0]"]
        return "\n".join([*dict.fromkeys(imports), "", *pipe, *call, 'picture.save("picture.png")'])

    def _as_settings(self) -> str:
        """The same for what only `Settings` can say in one call."""
        said = [f"    {name}={value!r}," for name, value in self._said().items()]
        own = ["from reifusion.own import run_file", "", f"run_file({self.code!r})"] if self.code else [""]
        return "\n".join(
            [
                "from reifusion.settings import Settings", *own, "settings = Settings(", *said, ")",
                "pipe = settings.pipe()",
                "picture = settings.draw(pipe, settings.request().for_model(pipe.config))",
                'picture.save("picture.png")',
            ]
        )  # fmt: skip

    def _said(self) -> dict[str, Any]:
        """Returns the settings that must be said for the picture to be the same."""

        def counts(name: str, value: Any) -> bool:
            if name == "strength":
                return self.init_image is not None
            if name == "control_mode":
                return bool(self.control) and value != ABOUT[name].default
            if name == "image_encoder":
                return bool(self.ip_adapter) and value is not None
            if name.startswith("hires_"):
                return self.hires != 1 and value != ABOUT[name].default
            return name == "model" or value != ABOUT[name].default

        values = {name: getattr(self, name) for name in ABOUT}
        return {name: value for name, value in values.items() if counts(name, value)}


BY_SETTINGS = (
    "manner", "rng", "variation", "variation_seed", "ensd", "mask_blur", "only_masked", "outpaint",
)  # fmt: skip
# What changes neither the model nor a request, but how it is drawn.
DRAWING = (*BY_SETTINGS, "hires", "hires_strength", "hires_by", "emphasis")
# What steers a model that is loaded.
STEERING = ("control", "control_mode", "ip_adapter", "image_encoder", "deepcache")


def pictures_of(path: str | None) -> list[str | None]:
    """Returns the pictures of a folder, by name, or what is no folder as it is. ValueError for no picture."""
    if path is None or not isdir(path):  # unlike Path's, it takes any name
        return [path]
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    seen = (one for one in Path(path).iterdir() if not one.name.startswith("."))
    found = sorted(str(one) for one in seen if one.suffix.lower() in kinds)
    if not found:
        raise ValueError(f"{path} cannot be read as a picture: it is a folder, and has none in it")
    return [*found]


def said_of_hires(settings: Settings) -> list[tuple[str, Any]]:
    """Returns the settings of the second pass, with their values."""
    return [(name, getattr(settings, name)) for name in ("hires", "hires_strength", "hires_by")]


ABOUT: dict[str, About] = {one.name: one.metadata["about"] for one in fields(Settings)}


def parsed(texts: Mapping[str, Any], manner: str | None = None) -> dict[str, Any]:
    """Reads settings in the form of a command line. Raises ValueError, in one sentence.

    manner: the one that is meant if they say none.
    """
    return named_here({name: ABOUT[name].parse(text) for name, text in texts.items()}, manner)


def named_here(values: dict[str, Any], manner: str | None) -> dict[str, Any]:
    """Returns settings with our names of samplers and schedules, where they have those of a program.

    manner: the program, if the settings name none. A name that it does not have remains as it is. Raises
    ValueError for a manner that is not known.
    """
    manner = values.get("manner", manner)
    sampler, schedule = values.get("sampler"), values.get("schedule")
    if manner is None or (sampler is None and schedule is None):
        return values
    from . import sampling  # noqa: F401  # adds its samplers
    from .steer import manners

    manners.check(manner, None)
    sampler, schedule = manners.names_here(manner, sampler or "", schedule)
    here = {"sampler": sampler or None, "schedule": schedule}
    return values | {name: value for name, value in here.items() if value is not None}


def from_carried(carried: Mapping[str, Any]) -> Settings:
    """Reads the settings that a picture carries, and ignores unknown names.

    Raises ValueError, with the name and the value, for a value of the wrong type.
    """
    values = {}
    for name, about in ABOUT.items():
        if carried.get(name) is not None:
            try:
                values[name] = about.carried(carried[name])
            except ValueError:
                raise ValueError(f"its {name} is {shown(carried[name])}") from None
    return Settings(**values)


def requested() -> list[str]:
    """Returns the names of the settings that a `Request` has too; the others concern the model."""
    from .model.request import Request

    known = {one.name for one in fields(Request)}
    return [name for name in ABOUT if name in known]


def of_request(request: Request) -> dict[str, Any]:
    """Returns the settings of a request's first picture, by name, without its input pictures."""
    values = {name: getattr(request, name) for name in requested() if name not in ("init_image", "mask")}
    return values | {"prompt": request.prompts[0], "negative": request.negatives[0]}
