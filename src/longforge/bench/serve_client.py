"""A client of the HTTP benchmark, in a process of its own: standard library only.

stdin: one JSON object, {"host", "port", "bodies": [body of POST /v1/completions, ...]}; bodies ask for
`stream` and `return_token_ids` and are sent all at once. stdout: one JSON array, of each answer the seconds
at which its tokens were there, on one clock.
"""

import http.client
import json
import sys
import threading
import time

__all__ = ["stream"]


def stream(host: str, port: int, body: dict, times: list[float]) -> None:
    """Reads one answer; `times` gets when each token was there. RuntimeError for another answer than that."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
    came: list[tuple[float, bytes]] = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            came.append((time.perf_counter(), line))
    for at, line in came:  # read when all is over, so that reading costs the server nothing
        for choice in json.loads(line[6:])["choices"]:
            times += [at] * len(choice.get("token_ids") or ())


def main() -> None:
    """Asks what stdin says, all at once."""
    asked = json.load(sys.stdin)
    times: list[list[float]] = [[] for _ in asked["bodies"]]
    threads = [
        threading.Thread(target=stream, args=(asked["host"], asked["port"], body, of))
        for body, of in zip(asked["bodies"], times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump(times, sys.stdout)


if __name__ == "__main__":
    main()
