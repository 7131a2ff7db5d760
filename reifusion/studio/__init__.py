"""A page in the browser, served from this machine only: type a prompt, watch, and look into what happened.

`wishes.py` reads the fields, `drawing.py` draws and keeps the picture, `views.py` and `stages.py` show it.
`layout.py` says what stands where on the page, `acts.py` what its parts do, and `page.py` serves it. The
page's own script and style are `studio.js` and `studio.css`.
"""
