import json
import os


class NotebookAccessError(Exception):
    pass


class SecretNotFoundError(Exception):
    pass


class TimeoutException(Exception):  # noqa: N818 - Colab's name
    pass


def get(key):
    told = os.environ.get("FAKE_COLAB_SECRETS", "{}")
    if told == "timeout":
        raise TimeoutException(f"Requesting secret {key} timed out. Secrets can only be fetched from the Colab UI.")
    secrets = json.loads(told)
    if key not in secrets:
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    if secrets[key] is None:
        raise NotebookAccessError(f"Notebook does not have access to secret {key}")
    return secrets[key]
