"""Pictures over HTTP: OpenAI's images API and that of AUTOMATIC1111's web UI, in front of one queue.

`app` puts the parts together. A request passes `security`, is read by one of the two dialects, `openai` or
`a1111`, becomes a `Job` in the `queue`, and is drawn there by one thread, one picture after the other.
"""
