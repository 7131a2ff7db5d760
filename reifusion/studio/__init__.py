"""A page in the browser, served from this machine only: type a prompt, watch, and look into what happened.

`wishes.py` reads what the page asks for, `drawing.py` draws and keeps each step, `views.py`, `stages.py` and
`excerpts.py` say what there is to see at a step, `shelf.py` lists the pictures, `known.py` the mini's words.
`routes.py` answers the page over HTTP and `serve.py` starts it. The page itself is plain HTML, CSS and
JavaScript in `page/`, a file for each part.
"""
