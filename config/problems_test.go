package config

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// with is minimal with one of its parts replaced.
func with(old, replacement string) string {
	if !strings.Contains(minimal, old) {
		panic("minimal has no " + old)
	}
	return strings.Replace(minimal, old, replacement, 1)
}

const (
	kmsDev = "kms: [{name: dev, plugin: {endpoint: unix:///run/k.sock}}]\n"
	kmsAge = "kms: [{name: dev, plugin: {endpoint: unix:///run/k.sock}}, {name: off, age: {recipients: [a]}}]\n"
	kmsTwo = "kms: [{name: dev, plugin: {endpoint: unix:///run/k.sock}}, {name: dr, plugin: {endpoint: unix:///run/dr.sock}}]\n"
)

// TestProblems gives each bad file the one problem that it has: path, line and a part of its text
// or hint.
func TestProblems(t *testing.T) {
	dir := t.TempDir()
	cert, key := pair(t)
	_, otherKey := pair(t)
	for name, data := range map[string][]byte{"crt": cert, "key": key, "other.key": otherKey, "junk": []byte("junk"),
		"bad.crt": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "crl": crl(t, cert, key)} {
		put(t, filepath.Join(dir, name), data)
	}
	listener := func(fields string) string {
		return strings.ReplaceAll(with("- address: 127.0.0.1:2379", "- "+fields), "DIR", dir)
	}
	const files = "certFile: DIR/crt, keyFile: DIR/key"
	tests := map[string]struct {
		file string
		path string
		line int
		text string
	}{
		"empty":                   {"", "", 1, "empty"},
		"only a comment":          {"# nothing\n", "", 1, "empty"},
		"a list":                  {"- a\n", "", 1, "a list, not a mapping"},
		"not YAML":                {minimal + "rules: [\n", "", 7, "not YAML"},
		"two documents":           {minimal + "---\nkind: x\n", "", 7, "second document"},
		"tab":                     {minimal + "\tlog: {}\n", "", 7, "not YAML"},
		"unknown field":           {minimal + "rule: []\n", "rule", 7, "did you mean rules?"},
		"unknown, nothing near":   {minimal + "zzzzzzzzz: []\n", "zzzzzzzzz", 7, "the fields here are"},
		"unknown, like nothing":   {minimal + "foo: []\n", "foo", 7, "the fields here are "},
		"unknown, nested":         {with("http://127.0.0.1:2379]", "http://127.0.0.1:2379]\n  endpoint: x"), "etcd.endpoint", 7, "did you mean endpoints?"},
		"wrong case":              {minimal + kmsDev + "rules: [{prefix: a, writewith: dev, writeWith: dev}]\n", "rules[0].writewith", 8, "did you mean writeWith?"},
		"newline in a name":       {minimal + "\"a\\nb\": 1\n", `"a\nb"`, 7, "unknown field"},
		"duplicate field":         {minimal + "kind: ProxyConfiguration\n", "kind", 7, "given twice, first on line 2"},
		"duplicate block":         {minimal + "log: {level: info, level: debug}\n", "log.level", 7, "given twice"},
		"a list as a name":        {minimal + "? [a]\n: b\n", "", 7, "a field's name is a list"},
		"null":                    {minimal + "admin:\n", "admin", 7, "has no value"},
		"anchor":                  {minimal + "rules: &r []\n", "rules", 7, "anchors and aliases"},
		"alias":                   {with("127.0.0.1:2379\netcd", "&a 127.0.0.1:2379\netcd"), "listeners[0].address", 4, "anchors and aliases"},
		"merge key":               {minimal + "<<: {log: {level: debug}}\n", `"<<"`, 7, "unknown field"},
		"no kind":                 {with("kind: ProxyConfiguration\n", ""), "kind", 1, "is required"},
		"other kind":              {with("kind: ProxyConfiguration", "kind: Config"), "kind", 2, `write ProxyConfiguration`},
		"other version":           {with("v1alpha1", "v2"), "apiVersion", 1, "does not read"},
		"no listeners":            {with("listeners:\n- address: 127.0.0.1:2379\n", ""), "listeners", 1, "is required"},
		"empty listeners":         {with("listeners:\n- address: 127.0.0.1:2379\n", "listeners: []\n"), "listeners", 3, "is empty"},
		"listeners not a list":    {with("listeners:\n- address", "listeners:\n  address"), "listeners", 3, "not a list"},
		"recovery unknown":        {minimal + kmsDev + "rules:\n- prefix: /a/\n  writeWith: dev\n  recovery: [dr]\n", "rules[0].recovery[0]", 11, "no KMS provider is called"},
		"recovery of itself":      {minimal + kmsDev + "rules: [{prefix: a, writeWith: dev, recovery: [dev]}]\n", "rules[0].recovery[0]", 8, "writeWith itself"},
		"recovery twice":          {minimal + kmsTwo + "rules: [{prefix: a, writeWith: dev, recovery: [dr, dr]}]\n", "rules[0].recovery[1]", 8, "twice"},
		"recovery plaintext":      {minimal + kmsTwo + "rules: [{prefix: a, writeWith: dev, recovery: [plaintext]}]\n", "rules[0].recovery[0]", 8, "not a KMS provider"},
		"recovery, odd name":      {minimal + strings.Replace(kmsTwo, "dr", "D_r", 1) + "rules: [{prefix: a, writeWith: dev, recovery: [D_r]}]\n", "rules[0].recovery[0]", 8, "lower-case"},
		"recovery, odd dots":      {minimal + strings.Replace(kmsTwo, "dr", "d..r", 1) + "rules: [{prefix: a, writeWith: dev, recovery: [d..r]}]\n", "rules[0].recovery[0]", 8, "lower-case"},
		"recovery of plaintext":   {minimal + kmsTwo + "rules: [{prefix: a, writeWith: plaintext, recovery: [dr]}]\n", "rules[0].recovery", 8, "readWith"},
		"recovery required":       {minimal + kmsTwo + "rules: [{prefix: a, writeWith: dev, recoveryRequired: true}]\n", "rules[0].recoveryRequired", 8, "no effect"},
		"recovery differs":        {minimal + kmsTwo + "rules:\n- {prefix: a, writeWith: dev, recovery: [dr]}\n- {prefix: b, writeWith: dev}\n", "rules[1]", 10, "as rules[0] does"},
		"recovery need differs":   {minimal + kmsTwo + "rules:\n- {prefix: a, writeWith: dev, recovery: [dr]}\n- {prefix: b, writeWith: dev, recovery: [dr], recoveryRequired: true}\n", "rules[1]", 10, "same recovery"},
		"advertised path":         {listener("{address: 127.0.0.1:1, advertiseClientURLs: ['http://h:1/x']}"), "listeners[0].advertiseClientURLs[0]", 4, "not the URL of a host and port"},
		"advertised without port": {listener("{address: 127.0.0.1:1, advertiseClientURLs: ['http://h']}"), "listeners[0].advertiseClientURLs[0]", 4, "not the URL of a host and port"},
		"advertised scheme":       {listener("{address: 127.0.0.1:1, advertiseClientURLs: ['https://h:1']}"), "listeners[0].advertiseClientURLs[0]", 4, "but the listener speaks http://"},
		"strange endpoint":        {listener("{address: 127.0.0.1:1, endpoint: 'http://other:2379'}"), "listeners[0].endpoint", 4, "is not one of etcd.endpoints"},
		"no port":                 {listener("address: 127.0.0.1"), "listeners[0].address", 4, "not host:port"},
		"big port":                {listener("address: 127.0.0.1:65536"), "listeners[0].address", 4, "not a port"},
		"named port":              {listener("address: 127.0.0.1:etcd"), "listeners[0].address", 4, "not a port"},
		"URL as address":          {listener("address: http://127.0.0.1:1"), "listeners[0].address", 4, "not host:port"},
		"bare IPv6":               {listener("address: ::1:2379"), "listeners[0].address", 4, "for IPv6"},
		"relative socket":         {listener("address: unix://run/p.sock"), "listeners[0].address", 4, "three slashes"},
		"abstract socket":         {listener("address: unix://@p"), "listeners[0].address", 4, "three slashes"},
		"long socket":             {listener("address: unix:///" + strings.Repeat("a", 107)), "listeners[0].address", 4, "limit is 107"},
		"mode on TCP":             {listener("{address: 127.0.0.1:1, mode: '0600'}"), "listeners[0].mode", 4, "only unix sockets"},
		"systemd without a name":  {listener("address: systemd://"), "listeners[0].address", 4, "FileDescriptorName="},
		"systemd with a path":     {listener("address: systemd:///run/etcd.sock"), "listeners[0].address", 4, "not a name of a socket"},
		"systemd with a colon":    {listener("address: 'systemd://a:b'"), "listeners[0].address", 4, "not a name of a socket"},
		"systemd with a mode":     {listener("{address: 'systemd://etcd', mode: '0660'}"), "listeners[0].mode", 4, "SocketMode="},
		"systemd, plain and TLS":  {listener("{address: 'systemd://etcd', insecurePlaintext: true, tls: {" + files + "}}"), "listeners[0].insecurePlaintext", 4, "contradicts"},
		"mode not octal":          {listener("{address: 'unix:///p', mode: '0680'}"), "listeners[0].mode", 4, "not an octal permission"},
		"mode without owner":      {listener("{address: 'unix:///p', mode: '0060'}"), "listeners[0].mode", 4, "let the owner"},
		"mode a list":             {listener("{address: 'unix:///p', mode: [6]}"), "listeners[0].mode", 4, "is a list, not a string"},
		"twice":                   {listener("address: 127.0.0.1:1\n- address: 127.0.0.1:1"), "listeners[1].address", 5, "the address of listeners[0] too"},
		"every address":           {listener(`address: ":2379"`), "listeners[0]", 4, "insecurePlaintext: true"},
		"0.0.0.0":                 {listener("address: 0.0.0.0:2379"), "listeners[0]", 4, "insecurePlaintext: true"},
		"host name":               {listener("address: example.test:2379"), "listeners[0]", 4, "insecurePlaintext: true"},
		"IPv6":                    {listener("address: '[2001:db8::1]:2379'"), "listeners[0]", 4, "insecurePlaintext: true"},
		"TLS without client CA":   {listener("{address: 10.0.0.1:1, tls: {" + files + "}}"), "listeners[0].tls.clientCAFile", 4, "is required"},
		"plaintext and TLS":       {listener("{address: 10.0.0.1:1, insecurePlaintext: true, tls: {" + files + ", clientCAFile: DIR/crt}}"), "listeners[0].insecurePlaintext", 4, "contradicts"},
		"TLS without key":         {listener("{address: 127.0.0.1:1, tls: {certFile: DIR/crt}}"), "listeners[0].tls.keyFile", 4, "is required"},
		"missing certificate":     {listener("{address: 127.0.0.1:1, tls: {certFile: DIR/no, keyFile: DIR/key}}"), "listeners[0].tls.certFile", 4, "/no: no such file"},
		"folder as certificate":   {listener("{address: 127.0.0.1:1, tls: {certFile: DIR, keyFile: DIR/key}}"), "listeners[0].tls.certFile", 4, "not a regular file"},
		"junk certificate":        {listener("{address: 127.0.0.1:1, tls: {certFile: DIR/junk, keyFile: DIR/key}}"), "listeners[0].tls.certFile", 4, "not a certificate and its key"},
		"key of another":          {listener("{address: 127.0.0.1:1, tls: {certFile: DIR/crt, keyFile: DIR/other.key}}"), "listeners[0].tls.certFile", 4, "does not match"},
		"client CA junk":          {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/junk}}"), "listeners[0].tls.clientCAFile", 4, "no PEM certificate"},
		"client CA a key":         {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/key}}"), "listeners[0].tls.clientCAFile", 4, "no PEM certificate"},
		"client CA damaged":       {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/bad.crt}}"), "listeners[0].tls.clientCAFile", 4, "cannot be parsed"},
		"CRL without CA":          {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCRLFile: DIR/crl}}"), "listeners[0].tls.clientCRLFile", 4, "without clientCAFile"},
		"CRL junk":                {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/crt, clientCRLFile: DIR/junk}}"), "listeners[0].tls.clientCRLFile", 4, "revocation list"},
		"CRL a certificate":       {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/crt, clientCRLFile: DIR/crt}}"), "listeners[0].tls.clientCRLFile", 4, "not X509 CRL"},
		"TLS 1.1":                 {listener("{address: 127.0.0.1:1, tls: {" + files + ", minVersion: '1.1'}}"), "listeners[0].tls.minVersion", 4, "1.2 or 1.3"},
		"suites of 1.3":           {listener("{address: 127.0.0.1:1, tls: {" + files + ", minVersion: 1.3, cipherSuites: [x]}}"), "listeners[0].tls.cipherSuites", 4, "cannot be chosen"},
		"suite of 1.3":            {listener("{address: 127.0.0.1:1, tls: {" + files + ", cipherSuites: [TLS_AES_128_GCM_SHA256]}}"), "listeners[0].tls.cipherSuites[0]", 4, "cannot be chosen"},
		"weak suite":              {listener("{address: 127.0.0.1:1, tls: {" + files + ", cipherSuites: [" + tls.InsecureCipherSuites()[0].Name + "]}}"), "listeners[0].tls.cipherSuites[0]", 4, "weaknesses"},
		"unknown suite":           {listener("{address: 127.0.0.1:1, tls: {" + files + ", cipherSuites: [AES]}}"), "listeners[0].tls.cipherSuites[0]", 4, "IANA names"},
		"names without CA":        {listener("{address: 127.0.0.1:1, allowedClients: [a]}"), "listeners[0].allowedClients", 4, "clientCAFile"},
		"backup without CA":       {listener("{address: 'unix:///p', ciphertextClients: [a]}"), "listeners[0].ciphertextClients", 4, "clientCAFile"},
		"empty name":              {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/crt}, allowedClients: ['']}"), "listeners[0].allowedClients[0]", 4, "is empty"},
		"name twice":              {listener("{address: 127.0.0.1:1, tls: {" + files + ", clientCAFile: DIR/crt}, allowedClients: [a, a]}"), "listeners[0].allowedClients[1]", 4, "twice"},
		"no endpoints":            {with("[http://127.0.0.1:2379]", "[]"), "etcd.endpoints", 6, "is empty"},
		"endpoint without scheme": {with("[http://127.0.0.1:2379]", "[127.0.0.1:2379]"), "etcd.endpoints[0]", 6, "https://host:port"},
		"endpoint without port":   {with("[http://127.0.0.1:2379]", "[http://127.0.0.1]"), "etcd.endpoints[0]", 6, "not host:port"},
		"endpoint with path":      {with("[http://127.0.0.1:2379]", "[http://127.0.0.1:2379/v3]"), "etcd.endpoints[0]", 6, "more than a host"},
		"endpoint without host":   {with("[http://127.0.0.1:2379]", "[http://:2379]"), "etcd.endpoints[0]", 6, "names no host"},
		"endpoint twice":          {with("[http://127.0.0.1:2379]", "[http://a:1, http://a:1]"), "etcd.endpoints[1]", 6, "twice"},
		"too few HTTP endpoints":  {with("[http://127.0.0.1:2379]", "[http://a:1, http://b:1]\n  httpEndpoints: [http://a:2]"), "etcd.httpEndpoints", 7, "has 1 URLs for 2 endpoints"},
		"strange HTTP endpoint":   {with("[http://127.0.0.1:2379]", "[http://a:1]\n  httpEndpoints: [ftp://a:2]"), "etcd.httpEndpoints[0]", 7, "https://host:port"},
		"mixed endpoints":         {with("[http://127.0.0.1:2379]", "[http://a:1, https://a:2]"), "etcd.endpoints[1]", 6, "one kind"},
		"TLS for http":            {minimal + "  tls: {}\n", "etcd.tls", 7, "no endpoint begins with https://"},
		"etcd CA junk":            {with("[http://127.0.0.1:2379]", "[https://a:1]\n  tls: {caFile: "+dir+"/junk}"), "etcd.tls.caFile", 7, "no PEM certificate"},
		"etcd cert without key":   {with("[http://127.0.0.1:2379]", "[https://a:1]\n  tls: {certFile: "+dir+"/crt}"), "etcd.tls", 7, "one of certFile and keyFile"},
		"skip and verify":         {with("[http://127.0.0.1:2379]", "[https://a:1]\n  tls: {insecureSkipVerify: true, serverName: a}"), "etcd.tls.insecureSkipVerify", 7, "contradicts"},
		"no bytes":                {minimal + "  maxRequestBytes: 0\n", "etcd.maxRequestBytes", 7, "not between"},
		"bytes in words":          {minimal + "  maxRequestBytes: 1.5MiB\n", "etcd.maxRequestBytes", 7, "whole number"},
		"no name":                 {minimal + "kms: [{plugin: {endpoint: unix:///k}}]\n", "kms[0].name", 7, "is required"},
		"colon":                   {minimal + "kms: [{name: 'a:b', plugin: {endpoint: unix:///k}}]\n", "kms[0].name", 7, "colon"},
		"space":                   {minimal + "kms: [{name: 'a b', plugin: {endpoint: unix:///k}}]\n", "kms[0].name", 7, "not a provider's name"},
		"long name":               {minimal + "kms: [{name: " + strings.Repeat("a", 64) + ", plugin: {endpoint: unix:///k}}]\n", "kms[0].name", 7, "at most 63"},
		"called plaintext":        {minimal + "kms: [{name: plaintext, plugin: {endpoint: unix:///k}}]\n", "kms[0].name", 7, "another name"},
		"same name":               {minimal + "kms:\n- {name: a, plugin: {endpoint: unix:///k}}\n- {name: a, plugin: {endpoint: unix:///l}}\n", "kms[1].name", 9, "the name of kms[0] too"},
		"no backend":              {minimal + "kms: [{name: a}]\n", "kms[0]", 7, "exactly one"},
		"two backends":            {minimal + "kms: [{name: a, plugin: {endpoint: unix:///k}, local: {keyFile: " + dir + "/key}}]\n", "kms[0]", 7, "plugin and local"},
		"plugin placeholder":      {minimal + "kms: [{name: a, plugin: {endpoint: unix:///run/kmsplugin/REPLACE.sock}}]\n", "kms[0].plugin.endpoint", 7, "write your own endpoint"},
		"alibaba placeholder":     {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, endpoint: REPLACE.example.com}}]\n", "kms[0].alibaba.endpoint", 7, "placeholder REPLACE"},
		"etcd placeholder":        {with("http://127.0.0.1:2379", "https://REPLACE:2379"), "etcd.endpoints[0]", 6, "placeholder REPLACE"},
		"plugin over TCP":         {minimal + "kms: [{name: a, plugin: {endpoint: 'tcp://a:1'}}]\n", "kms[0].plugin.endpoint", 7, "unix:///path"},
		"no timeout":              {minimal + "kms: [{name: a, plugin: {endpoint: unix:///k, timeout: 0s}}]\n", "kms[0].plugin.timeout", 7, "not between"},
		"quick polls":             {minimal + "kms: [{name: a, pollInterval: 1ms, plugin: {endpoint: unix:///k}}]\n", "kms[0].pollInterval", 7, "not between 1s"},
		"negative duration":       {minimal + "cache: {ttl: -1h}\n", "cache.ttl", 7, "not between"},
		"endless duration":        {minimal + "cache: {ttl: 2000000h}\n", "cache.ttl", 7, "10 years"},
		"number as duration":      {minimal + "cache: {ttl: 60}\n", "cache.ttl", 7, "not a duration"},
		"no seeds":                {minimal + "cache: {seeds: 0}\n", "cache.seeds", 7, "not between"},
		"missing key file":        {minimal + "kms: [{name: a, local: {keyFile: " + dir + "/no}}]\n", "kms[0].local.keyFile", 7, "no such file"},
		"alibaba without key":     {minimal + "kms: [{name: a, alibaba: {region: cn-hangzhou}}]\n", "kms[0].alibaba.keyID", 7, "is required"},
		"alibaba over http":       {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, endpoint: 'http://h'}}]\n", "kms[0].alibaba.endpoint", 7, "always uses HTTPS"},
		"alibaba, unknown type":   {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: x}}}]\n", "kms[0].alibaba.credentials.type", 7, "write accessKey or sts or ecsRAMRole or oidc or assumeRole"},
		"needless token":          {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {securityTokenFile: " + dir + "/junk}}}]\n", "kms[0].alibaba.credentials.securityTokenFile", 7, "type: sts or assumeRole"},
		"token of the base":       {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: assumeRole, securityTokenFile: " + dir + "/junk}}}]\n", "kms[0].alibaba.credentials.securityTokenFile", 7, "base: sts"},
		"key of an instance":      {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: ecsRAMRole, accessKeyIDFile: " + dir + "/junk}}}]\n", "kms[0].alibaba.credentials.accessKeyIDFile", 7, "has no effect with type ecsRAMRole"},
		"role of a key":           {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {roleARN: 'acs:ram::1:role/r'}}}]\n", "kms[0].alibaba.credentials.roleARN", 7, "has no effect with type accessKey"},
		"v1 of a key":             {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {allowMetadataV1: false}}}]\n", "kms[0].alibaba.credentials.allowMetadataV1", 7, "type: ecsRAMRole"},
		"external ID of oidc":     {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, externalID: x}}}]\n", "kms[0].alibaba.credentials.externalID", 7, "type: assumeRole"},
		"other base":              {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: assumeRole, base: oidc}}}]\n", "kms[0].alibaba.credentials.base", 7, "accessKey or sts"},
		"role, no ARN":            {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: assumeRole, roleARN: r}}}]\n", "kms[0].alibaba.credentials.roleARN", 7, "acs:ram::<account>:role/<name>"},
		"provider, no ARN":        {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, oidcProviderARN: 'acs:ram::1:role/r'}}}]\n", "kms[0].alibaba.credentials.oidcProviderARN", 7, "oidc-provider/<name>"},
		"role's name":             {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: ecsRAMRole, roleName: 'acs:ram::1:role/r'}}}]\n", "kms[0].alibaba.credentials.roleName", 7, "not its ARN"},
		"session's name":          {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, sessionName: a b}}}]\n", "kms[0].alibaba.credentials.sessionName", 7, "2 to 64"},
		"session's policy":        {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, policy: '{'}}}]\n", "kms[0].alibaba.credentials.policy", 7, "not JSON"},
		"short session":           {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, duration: 1m}}}]\n", "kms[0].alibaba.credentials.duration", 7, "15m to 12h"},
		"sts over http":           {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, stsEndpoint: 'http://h'}}}]\n", "kms[0].alibaba.credentials.stsEndpoint", 7, "always uses HTTPS"},
		"sts without CA":          {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, stsCAFile: " + dir + "/junk}}}]\n", "kms[0].alibaba.credentials.stsCAFile", 7, ""},
		"missing OIDC token":      {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, credentials: {type: oidc, oidcTokenFile: " + dir + "/no}}}]\n", "kms[0].alibaba.credentials.oidcTokenFile", 7, "no such file"},
		"ARN of another region":   {minimal + "kms: [{name: a, alibaba: {region: r, keyID: 'acs:kms:s:1:key/k'}}]\n", "kms[0].alibaba.keyID", 7, "not of region"},
		"context not strings":     {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, encryptionContext: {c: true}}}]\n", "kms[0].alibaba.encryptionContext.c", 7, "in quotes"},
		"context twice":           {minimal + "kms: [{name: a, alibaba: {region: r, keyID: k, encryptionContext: {c: a, c: b}}}]\n", "kms[0].alibaba.encryptionContext.c", 7, "twice"},
		"age without recipients":  {minimal + "kms: [{name: off, age: {}}]\n", "kms[0].age", 7, "name a recipientsFile"},
		"age with empty lists":    {minimal + "kms: [{name: off, age: {recipients: []}}]\n", "kms[0].age", 7, "has no recipients"},
		"age, unknown field":      {minimal + "kms: [{name: off, age: {recipients: [a], identity: b}}]\n", "kms[0].age.identity", 7, "unknown field"},
		"age, no recipients file": {minimal + "kms: [{name: off, age: {recipientsFile: " + dir + "/no}}]\n", "kms[0].age.recipientsFile", 7, "no such file"},
		"age, not in a copy":      {minimal + "kms: [{name: Off, age: {recipients: [a]}}]\n", "kms[0].name", 7, "lower-case letters"},
		"age and seeds":           {minimal + "kms: [{name: off, seedMaxAge: 1h, age: {recipients: [a]}}]\n", "kms[0].seedMaxAge", 7, "has no effect with age"},
		"age and local":           {minimal + "kms: [{name: off, local: {keyFile: " + dir + "/junk}, age: {recipients: [a]}}]\n", "kms[0]", 7, "local and age"},
		"age writes":              {minimal + kmsAge + "rules:\n- {prefix: a, writeWith: off}\n", "rules[0].writeWith", 9, "name it in recovery"},
		"age reads":               {minimal + kmsAge + "rules:\n- {prefix: a, writeWith: dev, readWith: [off]}\n", "rules[0].readWith[0]", 9, "only wraps recovery copies"},
		"no prefix":               {minimal + "rules: [{writeWith: plaintext}]\n", "rules[0].prefix", 7, "is required"},
		"same prefix":             {minimal + kmsDev + "rules:\n- {prefix: /a/, writeWith: dev}\n- {prefix: /a/, writeWith: plaintext}\n", "rules[1].prefix", 10, "the prefix of rules[0] too"},
		"same empty prefix":       {minimal + kmsDev + "rules:\n- {prefix: '', writeWith: dev}\n- {prefix: '', writeWith: dev}\n", "rules[1].prefix", 10, "the prefix of rules[0] too"},
		"no writeWith":            {minimal + "rules: [{prefix: a}]\n", "rules[0].writeWith", 7, "is required"},
		"undefined provider":      {minimal + "rules: [{prefix: a, writeWith: gone}]\n", "rules[0].writeWith", 7, `no KMS provider is called "gone"`},
		"undefined reader":        {minimal + "rules: [{prefix: a, writeWith: plaintext, readWith: [gone]}]\n", "rules[0].readWith[0]", 7, "define it under kms"},
		"reader twice":            {minimal + kmsDev + "rules: [{prefix: a, writeWith: plaintext, readWith: [dev, dev]}]\n", "rules[0].readWith[1]", 8, "twice"},
		"reader plaintext":        {minimal + kmsDev + "rules: [{prefix: a, writeWith: dev, readWith: [plaintext]}]\n", "rules[0].readWith[0]", 8, "allowPlaintextReads"},
		"strict plaintext":        {minimal + "rules: [{prefix: a, writeWith: plaintext, allowPlaintextReads: false}]\n", "rules[0].allowPlaintextReads", 7, "may not read"},
		"yes":                     {minimal + "rules: [{prefix: a, writeWith: plaintext, allowPlaintextReads: yes}]\n", "rules[0].allowPlaintextReads", 7, "neither true nor false"},
		"True":                    {minimal + "rules: [{prefix: a, writeWith: plaintext, allowPlaintextReads: True}]\n", "rules[0].allowPlaintextReads", 7, "neither true nor false"},
		"other policy":            {minimal + "rules: [{prefix: a, writeWith: plaintext, onUndecryptable: skip}]\n", "rules[0].onUndecryptable", 7, "error or passthrough"},
		"prefix true":             {minimal + "rules: [{prefix: true, writeWith: plaintext}]\n", "rules[0].prefix", 7, "in quotes"},
		"admin on a socket":       {minimal + "admin: {address: unix:///a}\n", "admin.address", 7, "not host:port"},
		"admin on the same port":  {minimal + "admin: {address: 127.0.0.1:2379}\n", "admin.address", 7, "the address of listeners[0]"},
		"profiles for everyone":   {minimal + "admin: {address: 0.0.0.0:1, pprof: true}\n", "admin.pprof", 7, "loopback"},
		"log level":               {minimal + "log: {level: loud}\n", "log.level", 7, "debug or info"},
		"log format":              {minimal + "log: {format: xml}\n", "log.format", 7, "json or text"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := Load(write(t, tt.file))
			ps, ok := errors.AsType[Problems](err)
			if !ok || c != nil {
				t.Fatalf("Load = %+v, %v; want problems", c, err)
			}
			if len(ps) != 1 {
				t.Fatalf("%d problems, want 1:\n%v", len(ps), ps)
			}
			p := ps[0]
			if p.Path != tt.path || p.Line != tt.line || !strings.Contains(p.Text+" "+p.Hint, tt.text) {
				t.Errorf("got %q, line %d, %q (%q)\nwant %q, line %d, with %q", p.Path, p.Line, p.Text, p.Hint, tt.path, tt.line, tt.text)
			}
		})
	}
}

// TestReachAllows is the other side of the listeners that are refused.
func TestReachAllows(t *testing.T) {
	dir := t.TempDir()
	cert, key := pair(t)
	put(t, filepath.Join(dir, "crt"), cert)
	put(t, filepath.Join(dir, "key"), key)
	put(t, filepath.Join(dir, "crl"), crl(t, cert, key))
	for _, fields := range []string{
		"address: localhost:2379", "address: '[::1]:2379'", "address: 127.9.9.9:2379", "address: unix:///run/p.sock",
		"{address: 0.0.0.0:2379, insecurePlaintext: true}",
		"{address: 0.0.0.0:2379, tls: {certFile: DIR/crt, keyFile: DIR/key, clientCAFile: DIR/crt, clientCRLFile: DIR/crl, " +
			"cipherSuites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305]}, allowedClients: [a], ciphertextClients: [a, b]}",
		"{address: 127.0.0.1:2379, tls: {certFile: DIR/crt, keyFile: DIR/key}}",
		"address: 127.0.0.1:0\n- address: 127.0.0.1:0",
	} {
		if _, err := Load(write(t, strings.ReplaceAll(with("- address: 127.0.0.1:2379", "- "+fields), "DIR", dir))); err != nil {
			t.Errorf("%s: %v", fields, err)
		}
	}
}

// TestUnreadableFile needs a user whom permissions bind.
func TestUnreadableFile(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	_, err := parse([]byte(minimal+"kms: [{name: a, local: {keyFile: key}}]\n"), filepath.Dir(key), func(path string) ([]byte, error) {
		return nil, &os.PathError{Op: "open", Path: path, Err: os.ErrPermission}
	}, Checks{})
	if ps, ok := errors.AsType[Problems](err); !ok || len(ps) != 1 || !strings.Contains(ps[0].Text, key+": permission denied") {
		t.Errorf("%v, want one problem that says permission denied", err)
	}
}

// TestNoPasswordInProblems: a URL may hold one.
func TestNoPasswordInProblems(t *testing.T) {
	for _, endpoint := range []string{"http://root:canary@h:1", "ftp://root:canary@h:1", "root:canary@h", "http://root:canary@h:1/\\x00"} {
		_, err := Load(write(t, with("[http://127.0.0.1:2379]", `["`+endpoint+`", "`+endpoint+`"]`)))
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: err = %v", endpoint, err)
		}
	}
}

// FuzzLoad: whatever the bytes, there is either a configuration or problems, each with a line of
// the file.
func FuzzLoad(f *testing.F) {
	example, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{minimal, string(example), "", "a: &a [*a]\n", "---\n---\n", "? {a: b}\n: c\n", "{[]: 1}", "!!binary x: y", "listeners: {tls: {}}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse(data, "/etc", func(string) ([]byte, error) { return nil, os.ErrNotExist }, Checks{})
		if (c == nil) == (err == nil) {
			t.Fatalf("parse = %v, %v", c, err)
		}
		if err == nil {
			if len(Weakens(c.Rules, c.Rules)) != 0 || len(NeedsRestart(c, c)) != 0 {
				t.Error("a configuration differs from itself")
			}
			return
		}
		ps, ok := errors.AsType[Problems](err)
		if !ok || len(ps) == 0 {
			t.Fatalf("err = %v, want Problems", err)
		}
		for _, p := range ps {
			if p.Line < 1 || p.Text == "" {
				t.Errorf("problem %+v has no line or text", p)
			}
		}
	})
}

// crl makes an empty revocation list.
func crl(t *testing.T, cert, key []byte) []byte {
	t.Helper()
	p, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	signer, ok := p.PrivateKey.(crypto.Signer)
	if !ok {
		t.Fatal("the key does not sign")
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
	}, p.Leaf, signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// TestUnnamedProvider: a name that is missing is not among those to choose from.
func TestUnnamedProvider(t *testing.T) {
	_, err := Load(write(t, minimal+"kms: [{name: ~, plugin: {endpoint: unix:///run/k.sock}}]\nrules: [{prefix: a, writeWith: dev}]\n"))
	if got := text(err); !strings.Contains(got, `no KMS provider is called "dev" (define it under kms, or use plaintext)`) {
		t.Error(got)
	}
}
