"""A fake of Kaggle's package: secrets from FAKE_KAGGLE_SECRETS."""

import json
import os


class BackendError(Exception):
    pass


class UserSecretsClient:
    def get_secret(self, label):
        secrets = json.loads(os.environ.get("FAKE_KAGGLE_SECRETS", "{}"))
        if label not in secrets:
            raise BackendError(f"No user secrets exist for kernel id 1 and label {label}.")
        return secrets[label]
