"""A misspelled DICOM keyword is an error in every test of this folder."""

import pydicom

pydicom.config.INVALID_KEYWORD_BEHAVIOR = "RAISE"
