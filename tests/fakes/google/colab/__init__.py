"""What of Colab's own package lorakit's notebooks touch, with its signatures, for tests away from Colab.

What a person would do in the browser is told by environment variables, so that it works in any kernel:

    FAKE_COLAB_DRIVE      "refused": permission for Drive is not given
    FAKE_COLAB_SECRETS    JSON, name → value; null is a secret the notebook may not read. "timeout": nobody answers
    FAKE_COLAB_UPLOAD     files that are chosen in the dialog, separated as in PATH
    FAKE_COLAB_DOWNLOADS  folder that downloads arrive in
"""
