"""The protocol as documents for other languages, made from the classes of protocol.py.

    d2f.v1.json     JSON Schema 2020-12: every operation and message
    asyncapi.json   AsyncAPI 3.0: where they travel, over websocket and MQTT

`python -m d2f_stream.schema` writes both anew; a test fails when they differ from the classes.
"""
