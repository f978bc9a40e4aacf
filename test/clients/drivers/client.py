"""Driver of google-auth; ring/client.go has the questions."""

import json
import sys

import google.auth
import google.auth.compute_engine
import google.auth.compute_engine._metadata as metadata
import google.auth.transport.requests
from google.auth import version

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
PLATFORM = "https://www.googleapis.com/auth/cloud-platform"
AUDIENCE = "https://run.example.com"
request = google.auth.transport.requests.Request()
kept = {}


def default(scope=PLATFORM):
    if scope not in kept:
        kept[scope] = google.auth.default(scopes=[scope])
    return kept[scope]


def token(scope=PLATFORM):
    credentials, _ = default(scope)
    headers = {}
    credentials.before_request(request, "GET", "https://storage.googleapis.com/", headers)
    return headers["authorization"].removeprefix("Bearer ")


def identity():
    credentials = google.auth.compute_engine.IDTokenCredentials(request, AUDIENCE, use_metadata_identity_endpoint=True)
    credentials.refresh(request)
    return credentials.token


def email():
    token()
    return default()[0].service_account_email


ASK = {
    "version": lambda: version.__version__,
    "detect": lambda: "true" if metadata.is_on_gce(request) else "false",
    "token": token,
    "scoped": lambda: token(SCOPE),
    "id": identity,
    "email": email,
    "project": lambda: default()[1],
    "universe": lambda: default()[0].universe_domain,
}

for line in sys.stdin:
    question = line.strip()
    answer = {}
    if question not in ASK:
        answer["none"] = True
    else:
        try:
            answer["value"] = ASK[question]()
        except Exception as e:  # every error of the library is an answer
            answer["error"] = repr(e)[:500]
    print(json.dumps(answer), flush=True)
