"""A page in the browser, served from this machine only: type a prompt, watch, and look into what happened.

`wishes.py` is what is asked for, `drawing.py` how it is drawn and kept, `views.py` and `stages.py` how it is
shown, `page.py` the page. The page's own script and style are `studio.js` and `studio.css`.
"""
