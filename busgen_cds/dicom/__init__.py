"""The only place that knows pydicom, highdicom and pynetdicom."""

import logging
import warnings

import pydicom.config

# pydicom's warnings and decoding errors quote what stands in a data set, and a name must never reach a log
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
# what comes in is judged by intake, what goes out by `checks`: a too long identifier goes out as it came in
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
