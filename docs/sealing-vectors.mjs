// Checks the test vectors of the sealed format (sealed-format.md) with another implementation of AES-256-GCM-SIV than
// tokenstore's. It needs Node.js 20 or later. Run it in the root of a clone:
//
//     npm install --no-save @noble/ciphers@2
//     node docs/sealing-vectors.mjs

import { readFileSync } from "node:fs";
import { gcmsiv } from "@noble/ciphers/aes.js";

const utf8 = new TextEncoder();
const hex = (text) => Uint8Array.from(Buffer.from(text, "hex"));
const toHex = (bytes) => Buffer.from(bytes).toString("hex");
const joined = (...parts) => Uint8Array.from(parts.flatMap((part) => [...part]));

function placeOf(vector) {
  return vector.kind === "value"
    ? [vector.namespace, vector.value_namespace, vector.value_name, vector.field]
    : [vector.namespace, vector.provider, vector.user_id, vector.account, vector.field];
}

function associatedData(header, place) {
  const texts = place.map((text) => utf8.encode(text));
  return joined(header, ...texts.flatMap((text) => [[text.length >> 8, text.length & 255], text]));
}

function seal(keyName, key, place, nonce, plaintext) {
  const name = utf8.encode(keyName);
  const header = joined([1, name.length], name);
  return joined(header, nonce, gcmsiv(key, nonce, associatedData(header, place)).encrypt(utf8.encode(plaintext)));
}

function open(keyring, place, sealed) {
  if (sealed[0] !== 1 || !(sealed[1] >= 1 && sealed[1] <= 32)) throw new Error("not of this format");
  const end = 2 + sealed[1];
  const header = sealed.subarray(0, end);
  const nonce = sealed.subarray(end, end + 12);
  const body = sealed.subarray(end + 12);
  if (body.length <= 16) throw new Error("too short");
  const name = Buffer.from(header.subarray(2)).toString("latin1");
  if (!/^[A-Za-z0-9._-]+$/.test(name)) throw new Error("no name of a key");
  if (!keyring.has(name)) throw new Error("an unknown key");
  const plaintext = gcmsiv(keyring.get(name), nonce, associatedData(header, place)).decrypt(body);
  return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(plaintext);
}

const vectors = JSON.parse(readFileSync(new URL("sealing-vectors.json", import.meta.url), "utf-8"));
const wrong = [];
for (const vector of vectors.opens) {
  const key = hex(vector.key);
  const place = placeOf(vector);
  const sealed = hex(vector.sealed);
  const header = sealed.subarray(0, 2 + sealed[1]);
  const right =
    toHex(associatedData(header, place)) === vector.associated_data &&
    toHex(seal(vector.key_name, key, place, hex(vector.nonce), vector.plaintext)) === vector.sealed &&
    open(new Map([[vector.key_name, key]]), place, sealed) === vector.plaintext;
  if (!right) wrong.push(vector.description);
}
for (const vector of vectors.does_not_open) {
  try {
    open(new Map([[vector.key_name, hex(vector.key)]]), placeOf(vector), hex(vector.sealed));
  } catch {
    continue;
  }
  wrong.push(vector.description);
}
const count = vectors.opens.length + vectors.does_not_open.length;
console.log(wrong.length ? `WRONG: ${wrong.join("; ")}` : `all ${count} vectors are right`);
process.exitCode = wrong.length ? 1 : 0;
