"""An OpenAI-compatible endpoint for tests: a function from prompt and seed to (content, finish reason) serves it.

A number in place of the finish reason refuses the request with that HTTP status. A dict in place of the content is the
whole body of the reply.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """Serves `base_url` while used as a context manager; `asked` holds (prompt, seed, body) of every request."""

    def __init__(self, answer):
        self.answer, self.asked, self.keys, self.bodies = answer, [], set(), []

    def __enter__(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt, seed = request["messages"][-1]["content"], request.get("seed", 0)
                endpoint.asked.append((prompt, seed))
                endpoint.bodies.append(request)
                endpoint.keys.add(self.headers.get("Authorization"))
                content, finish = endpoint.answer(prompt, seed)
                message = {"role": "assistant", "content": content}
                values = content
                if not isinstance(content, dict):
                    values = {
                        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                        "usage": {"completion_tokens": len(content.split())},
                    }
                body = json.dumps(values).encode()
                self.send_response(finish if isinstance(finish, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
