"""See inside: how a picture forms, which word made which pixel, what every module does, what breaks it.

Everything here watches the model, by the steps of `StableDiffusion.denoise`, the `hook` of an attention
layer and PyTorch's hooks, or replaces a part of it for a while, by `swap`. `trajectory`, `words` and `trace`
look at one picture, and `folder` puts them together; `experiments`, `ablate`, `latents`, `schedule`,
`tokens` and `halves` answer one question each; `bugs` breaks the model; `profile` says where the time goes.
"""
