// What grpc-js finds when it talks to the server: one line for each check, "NAME ok" or "NAME what was wrong".
//
// usage: node checks.js PACKAGE TARGET FOLDER all|drain [CA CERTIFICATE KEY]. PACKAGE is the folder of @grpc/grpc-js;
// the rest is said in the test that runs this, tests/integration/test_grpc_clients.py.
'use strict';
const fs = require('fs');
const path = require('path');

const [grpcFolder, target, folder, what, ...pem] = process.argv.slice(2);
const grpc = require(grpcFolder);
const PATIENCE_MS = 20000;
const WARM_CALLS = 200;
const INFER = '/inference.GRPCInferenceService/ModelInfer';
const STREAM_INFER = '/inference.GRPCInferenceService/ModelStreamInfer';

const raw = (bytes) => bytes;
const file = (name) => fs.readFileSync(path.join(folder, name));
const credentials = pem.length === 3
  ? grpc.credentials.createSsl(fs.readFileSync(pem[0]), fs.readFileSync(pem[2]), fs.readFileSync(pem[1]))
  : grpc.credentials.createInsecure();
const client = new grpc.Client(target, credentials, {
  'grpc.max_send_message_length': -1, 'grpc.max_receive_message_length': -1,
});
const gzipped = new grpc.Client(target, credentials, {'grpc.default_compression_algorithm': 2});

class Failed extends Error {
  constructor(error) {
    super(`${error.code} ${error.details}`);
    Object.assign(this, {code: error.code, details: error.details, trailers: error.metadata});
  }
}

// One unary call: {answer, headers}, or Failed. ``started`` is given the call.
function call(method, request, {metadata = new grpc.Metadata(), ms = PATIENCE_MS, started, by = client} = {}) {
  return new Promise((resolve, reject) => {
    let headers;
    const options = {deadline: Date.now() + ms};
    const made = by.makeUnaryRequest(method, raw, raw, request, metadata, options, (error, answer) => {
      if (error) reject(new Failed(error)); else resolve({answer, headers});
    });
    made.on('metadata', (got) => { headers = got; });
    if (started) started(made);
  });
}

async function right(name, options) {
  const got = await call(INFER, file(name + '.request'), options);
  if (!got.answer.equals(file(name + '.answer'))) throw new Error(`wrong answer of ${got.answer.length} bytes`);
  return got.headers;
}

async function fails(code, promise) {
  try {
    await promise;
  } catch (error) {
    if (error.code === code) return error;
    throw new Error(`${error.message} instead of ${code}`);
  }
  throw new Error(`OK instead of ${code}`);
}

const stream = () => client.makeBidiStreamRequest(
  STREAM_INFER, raw, raw, new grpc.Metadata(), {deadline: Date.now() + PATIENCE_MS});
const several = (count, work) => Promise.all(Array.from({length: count}, (_, i) => work(i)));

const checks = {
  async unary() {
    for (let i = 0; i < 50; i++) await right(['small', 'other'][i % 2]);
  },
  async metadata() {
    const metadata = new grpc.Metadata();
    metadata.set('x-key', 'grpc-js');
    metadata.set('x-key-bin', Buffer.from(Array.from({length: 256}, (_, i) => i)));
    const headers = await right('small', {metadata});
    if (headers.get('x-tidegate-id').length !== 1 || headers.get('x-tidegate-version')[0] !== '1') {
      throw new Error(JSON.stringify(headers.getMap()));
    }
  },
  async stream() {
    const both = stream();
    for (let i = 0; i < 100; i++) both.write(file(['small', 'other'][i % 2] + '.request'));
    both.end();
    let count = 0;
    for await (const answer of both) {
      if (!answer.equals(file(['small', 'other'][count++ % 2] + '.streamed'))) throw new Error(`wrong answer ${count}`);
    }
    if (count !== 100) throw new Error(`${count} answers`);
  },
  // A stream that is given up half way leaves the connection whole.
  async given_up() {
    const both = stream();
    both.write(file('small.request'));
    await fails(grpc.status.CANCELLED, new Promise((resolve, reject) => {
      both.on('data', () => both.cancel());
      both.on('error', (error) => reject(new Failed(error)));
      both.on('end', resolve);
    }));
    await right('small');
  },
  async gzip() {
    await right('large', {by: gzipped});
  },
  async large() {
    await several(8, async () => { for (let i = 0; i < 4; i++) await right('large'); });
  },
  async deadline() {
    for (let i = 0; i < 10; i++) {
      await fails(grpc.status.DEADLINE_EXCEEDED, call(INFER, file('held.request'), {ms: 50}));
    }
    await right('small');
  },
  // Each line of errors.txt: path, request, status, trailer retry-after or "-", text or "*".
  async errors() {
    for (const line of file('errors.txt').toString().trim().split('\n')) {
      const [method, request, code, after, text] = line.split('\t');
      const error = await fails(Number(code), call(method, file(request)));
      if (text !== '*' && error.details !== text) throw new Error(`${line}: ${error.details}`);
      const told = error.trailers.get('retry-after').join();
      if (after !== '-' && told !== after) throw new Error(`${line}: retry-after ${told}`);
    }
  },
  async health() {
    const serving = Buffer.from([8, 1]);
    const {answer} = await call('/grpc.health.v1.Health/Check', Buffer.alloc(0));
    if (!answer.equals(serving)) throw new Error(`Check ${answer.toString('hex')}`);
    const watch = client.makeServerStreamRequest(
      '/grpc.health.v1.Health/Watch', raw, raw, Buffer.alloc(0), new grpc.Metadata(), {deadline: Date.now() + PATIENCE_MS});
    await fails(grpc.status.CANCELLED, new Promise((resolve, reject) => {
      watch.on('data', (first) => { if (first.equals(serving)) watch.cancel(); else reject(new Error('not serving')); });
      watch.on('error', (error) => reject(new Failed(error)));
      watch.on('end', resolve);
    }));
  },
  // Eight at once on one connection, every second call of each cancelled: the kept half is right.
  async storm() {
    const calls = Number(file('storm.txt').toString());
    await several(8, async () => {
      for (let i = 0; i < calls; i++) {
        if (i % 2 === 0) {
          await right('small');
          continue;
        }
        const cancelled = (made) => { if (i % 4 === 1) setImmediate(() => made.cancel()); else made.cancel(); };
        try {
          await right('small', {started: cancelled});
        } catch (error) {
          if (error.code !== grpc.status.CANCELLED) throw error;
        }
      }
    });
  },
};

// Eight callers until nobody listens any more; "warm" once enough was answered. Then a line "N what" for each outcome.
async function drain() {
  const tally = {};
  const note = (outcome) => {
    tally[outcome] = (tally[outcome] || 0) + 1;
    if (outcome === 'ok' && tally[outcome] === WARM_CALLS) console.log('warm');
  };
  await several(8, async () => {
    for (;;) {
      try {
        await right('small');
        note('ok');
      } catch (error) {
        note(error.code === grpc.status.UNAVAILABLE && error.details.includes('ECONNREFUSED') ? 'refused' : error.message);
        return;
      }
    }
  });
  for (const [outcome, count] of Object.entries(tally)) console.log(count, outcome);
}

async function main() {
  if (what === 'drain') {
    await drain();
  } else {
    for (const [name, check] of Object.entries(checks)) {
      const said = await check().then(() => 'ok', (error) => error.message.replaceAll('\n', ' '));
      console.log(name, said);
    }
  }
  client.close();
  gzipped.close();
}

main();
