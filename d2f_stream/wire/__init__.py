"""What clients and servers say to each other: messages, encodings and topics. No transport."""
