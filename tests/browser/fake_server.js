/**
 * A server for d2f-client.js without sockets: keeps streams as logs, and can be cut at any message.
 *
 * An expression whose value is the function that makes one. `random` (0 to below 1) decides where
 * the line breaks, so that a seed repeats a run.
 */
({ blocks = ["one ", "two ", "three"], cutShare = 0, random = Math.random, greets = true } = {}) => {
  const server = {
    sockets: [],
    operations: [],
    streams: new Map(), // request_id -> { id, log }
    numCuts: 0,
    numStarted: 0,
    onOpen: (socket) => {
      if (greets) socket.deliver({ type: "server.hello", protocol: 1, model: { name: "fake" } });
    },
    onOperation: (operation, socket) => server.answer(operation, socket),

    /** The last connection that was opened. */
    get socket() {
      return server.sockets.at(-1);
    },

    answer(operation, socket) {
      switch (operation.type) {
        case "generate":
          socket.send_log(server.start(operation.request_id).log, -1);
          break;
        case "resume": {
          const found = [...server.streams.values()].find(({ id }) => id === operation.stream);
          if (found) socket.send_log(found.log, operation.after_seq);
          else {
            const { stream } = operation;
            socket.deliver({ type: "request.rejected", code: "stream_lost", message: "no", stream });
          }
        }
      }
    },

    start(request_id) {
      if (!server.streams.has(request_id)) {
        server.numStarted += 1;
        const stream = `stream-${server.numStarted}`;
        const started = { type: "stream.started", stream, seq: 0, request_id, model: "fake" };
        const log = [{ ...started, block_size: 4, prompt_tokens: 1 }];
        blocks.forEach((text, index) => {
          const seq = index + 1;
          const place = { index, start: 4 * index, stop: 4 * index + 4, steps: seq, elapsed_ms: seq };
          log.push({ type: "block.committed", stream, seq, text, token_ids: [index], ...place });
        });
        const usage = { prompt_tokens: 1, completion_tokens: blocks.length, steps: blocks.length };
        const timings = { first_block_ms: 1, total_ms: 2 };
        const end = { type: "stream.finished", stream, seq: log.length, reason: "eos" };
        log.push({ ...end, text_length: blocks.join("").length, usage, timings });
        server.streams.set(request_id, { id: stream, log });
      }
      return server.streams.get(request_id);
    },
  };

  server.WebSocket = class {
    constructor(url, protocols) {
      this.url = url;
      this.protocols = protocols;
      this.isOpen = true;
      this.line = Promise.resolve();
      server.sockets.push(this);
      this.next(() => this.onopen?.({}));
      this.next(() => server.onOpen(this));
    }

    /** Do something after all before it, unless the line breaks first. */
    next(act) {
      this.line = this.line.then(() => {
        if (!this.isOpen) return;
        if (random() < cutShare) this.cut();
        else act();
      });
    }

    send(data) {
      const operation = JSON.parse(data);
      if (operation.type === "authenticate") return;
      this.next(() => {
        server.operations.push(operation);
        server.onOperation(operation, this);
      });
    }

    send_log(log, after) {
      for (const event of log) if (event.seq > after) this.deliver(event);
    }

    deliver(message) {
      this.next(() => this.onmessage?.({ data: JSON.stringify(message) }));
    }

    cut(code = 1006, reason = "") {
      if (!this.isOpen) return;
      this.isOpen = false;
      server.numCuts += 1;
      this.onclose?.({ code, reason });
    }

    close() {
      this.isOpen = false;
    }
  };
  return server;
}
