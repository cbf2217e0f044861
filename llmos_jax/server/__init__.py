"""Answer HTTP requests as OpenAI's API does, with what an engine says.

`door` lets requests in, `protocol` says what may be asked, `prepare` turns it into what
the engine reads, `answers` collects what the engine says, `replies` what is answered.
"""

from llmos_jax.server.app import make_app
from llmos_jax.server.options import ServerOptions
from llmos_jax.server.run import run

__all__ = ["ServerOptions", "make_app", "run"]
