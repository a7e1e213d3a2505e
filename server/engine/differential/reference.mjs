// Asks the reference implementation of Cedar. Each line of the input is a list
// of calls [function, arguments], each line of the output the list of answers.
// An argument {"text": …} is JSON as text, which reaches the reference as it is.
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const cedar = createRequire(import.meta.url)('@cedar-policy/cedar-wasm/nodejs');

// The bindings turn every argument into text with JSON.stringify. What is text
// already must not go through JavaScript's numbers, which round large ones.
class Text {
  constructor(text) {
    this.text = text;
  }
}
const stringify = JSON.stringify;
JSON.stringify = (value, ...rest) => (value instanceof Text ? value.text : stringify(value, ...rest));

function call([name, args]) {
  try {
    return cedar[name](...args.map((a) => (typeof a === 'string' ? a : new Text(a.text))));
  } catch (error) {
    return { type: 'thrown', errors: [{ message: String(error) }] };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(stringify(JSON.parse(line).map(call)) + '\n');
}
