// Each node that a tool starts reads this: another machine is refused, and written down.
import { appendFileSync } from "node:fs";
import net from "node:net";

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...all) {
  const { host } = Array.isArray(all[0]) ? all[0][0] : all[0];
  if (host && !/^(127\.|localhost$|::1$)/.test(host)) {
    appendFileSync(process.env.CALLS_OUT, `${host}\n`);
    throw new Error(`no tool may turn to ${host}`);
  }
  return connect.apply(this, all);
};
