"""See inside: how a picture forms, which word made which pixel, what every module does, what breaks it.

Most of it watches the model through its two seams: the steps that `StableDiffusion.denoise` yields, and the
`hook` of the attention layers. `trajectory`, `words` and `trace` look at one picture, and `folder` binds
them together; `experiments`, `ablate`, `latents`, `schedule`, `tokens` and `halves` answer one question each.
"""
