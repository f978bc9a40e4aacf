// Driver of Google's libraries for Node.js; ring/client.go has the questions.
// Arguments: the library, and its older major version or "" for the newest.
'use strict';
const readline = require('node:readline');
const fs = require('node:fs');

const [library, major] = process.argv.slice(2);
const suffix = major ? `-${major}` : '';
const scope = 'https://www.googleapis.com/auth/devstorage.read_only';
const platform = 'https://www.googleapis.com/auth/cloud-platform';
const audience = 'https://run.example.com';
const version = name => () =>
  JSON.parse(fs.readFileSync(`${process.env.NODE_PATH}/${name}/package.json`, 'utf8')).version;
const once = make => {
  let made;
  return () => (made ??= make());
};

const libraries = {
  'gcp-metadata': () => {
    const name = `gcp-metadata${suffix}`;
    const metadata = require(name);
    const token = async params => (await metadata.instance({property: 'service-accounts/default/token', params})).access_token;
    return {
      version: version(name),
      detect: async () => String(await metadata.isAvailable()),
      token: () => token({}),
      scoped: () => token({scopes: scope}),
      id: () => metadata.instance({property: 'service-accounts/default/identity', params: {audience, format: 'full'}}),
      email: () => metadata.instance('service-accounts/default/email'),
      project: () => metadata.project('project-id'),
      universe: () => metadata.universe('universe-domain'),
    };
  },
  'google-auth-library': () => {
    const name = `google-auth-library${suffix}`;
    const {GoogleAuth} = require(name);
    const usual = once(() => new GoogleAuth({scopes: platform}));
    const scoped = once(() => new GoogleAuth({scopes: scope}));
    return {
      version: version(name),
      detect: async () => String(Boolean(await usual().getClient())),
      token: () => usual().getAccessToken(),
      scoped: () => scoped().getAccessToken(),
      id: async () => (await usual().getIdTokenClient(audience)).idTokenProvider.fetchIdToken(audience),
      email: async () => (await usual().getCredentials()).client_email,
      project: () => usual().getProjectId(),
      universe: () => usual().getUniverseDomain(),
    };
  },
  storage: () => {
    const name = `@google-cloud/storage${suffix}`;
    const {Storage} = require(name);
    const options = {apiEndpoint: process.env.RING_STORAGE, useAuthWithCustomEndpoint: true};
    const storage = once(() => new Storage(options));
    return {
      version: version(name),
      detect: async () => String(Boolean(await storage().authClient.getClient())),
      // The ring's Cloud Storage answers with the token as the name of the bucket.
      token: async () => (await storage().bucket('bucket').getMetadata())[0].name,
      email: async () => (await storage().authClient.getCredentials()).client_email,
      project: () => storage().authClient.getProjectId(),
    };
  },
};

const ask = libraries[library]();
(async () => {
  for await (const line of readline.createInterface({input: process.stdin})) {
    const answer = {};
    if (!Object.hasOwn(ask, line)) {
      answer.none = true;
    } else {
      try {
        answer.value = await ask[line]();
      } catch (e) {
        answer.error = String(e.message ?? e).slice(0, 500);
      }
    }
    process.stdout.write(JSON.stringify(answer) + '\n');
  }
  process.exit(0);
})();
