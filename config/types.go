package config

import (
	"io/fs"
	"time"
)

// Config is the whole file.
//
// Durations are written as in Go: `90s`, `1m`, `24h`. A relative file name is relative to the
// folder of the configuration file. The file contains no secrets, only the names of files or
// environment variables that contain them. Anchors, aliases and a second document are refused.
type Config struct {
	// APIVersion is always `etcd-kms-proxy.io/v1alpha1`.
	APIVersion string `yaml:"apiVersion" required:"true"`
	// Kind is always `ProxyConfiguration`.
	Kind string `yaml:"kind" required:"true"`
	// Listeners are the addresses for clients. Their allowedClients and ciphertextClients are
	// reloaded; any other change needs a restart.
	Listeners []Listener `yaml:"listeners" required:"true"`
	// Etcd is the cluster behind the proxy. A change needs a restart.
	Etcd Etcd `yaml:"etcd" required:"true"`
	// KMS are the providers of keys, which rules refer to by name. A change needs a restart.
	KMS []KMS `yaml:"kms"`
	// Rules say which values are encrypted, and how. If several prefixes match a key, the longest
	// one applies. Keys without a rule pass unchanged. Rules are reloaded.
	Rules []Rule `yaml:"rules"`
	// Cache limits how many unwrapped DEK seeds are kept, for how long, and what still works while
	// a KMS does not answer. A change needs a restart.
	Cache Cache `yaml:"cache"`
	// Coordination is how the proxies in front of one etcd detect each other. A change needs a
	// restart.
	Coordination Coordination `yaml:"coordination"`
	// Admin is the HTTP server for metrics and health. Without this block there is none. A change
	// needs a restart.
	Admin *Admin `yaml:"admin"`
	// Audit is a tamper-evident log of every KMS call, every denied client and every reload.
	// Without this block there is none. A change needs a restart.
	Audit *Audit `yaml:"audit"`
	// Log sets what is logged, on standard error. The level is reloaded.
	Log Log `yaml:"log"`
}

// Listener is an address that clients connect to.
type Listener struct {
	// Address is `host:port`, or `unix:///path` for a socket. Port 0 selects a free port, which is
	// logged. A host that is not a loopback address needs TLS with client certificates, or
	// insecurePlaintext. `systemd://NAME` uses the sockets that systemd passes under the name in
	// `FileDescriptorName=` of a socket unit. Whether these need TLS is checked when the proxy
	// starts.
	Address string `yaml:"address" required:"true"`
	// Mode is the permission of a unix socket, in octal. Every user who may write to the socket can
	// read every value. A socket unit of systemd has `SocketMode=` instead.
	Mode string `yaml:"mode" default:"0600"`
	// TLS is required for addresses that other machines reach.
	TLS *ListenerTLS `yaml:"tls"`
	// AllowedClients are the common names or subject alternative names of client certificates that
	// may connect. When empty, every certificate of clientCAFile may. Needs clientCAFile. When the
	// list is reloaded, the connections of clients that it treats differently end.
	AllowedClients []string `yaml:"allowedClients"`
	// CiphertextClients are the names of client certificates that get stored bytes instead of
	// values and can only read: for backups, and as the source of a mirror. Every method that
	// changes something is refused: puts, deletes, leases, compaction, defragmentation, users,
	// members. They may connect without being in allowedClients. Needs clientCAFile.
	CiphertextClients []string `yaml:"ciphertextClients"`
	// AdvertiseClientURLs replace the client URLs of etcd's members in responses to clients, so
	// that a client that follows the members' URLs stays with the proxy. A member with its own
	// listener (see endpoint) gets the URLs of that listener, the others those of this one. When
	// empty, the members' URLs pass unchanged.
	AdvertiseClientURLs []string `yaml:"advertiseClientURLs"`
	// Endpoint is one of `etcd.endpoints`: the only one that this listener uses. With one listener
	// for each member, a client can address a particular member, for its status, a snapshot or a
	// defragmentation. When empty, the listener uses all endpoints.
	Endpoint string `yaml:"endpoint"`
	// Gateway serves etcd's JSON gateway, the paths under `/v3/`. `false` turns it off, like etcd's
	// own `--enable-grpc-gateway=false`; `/health`, `/livez`, `/readyz`, `/version` and `/metrics`
	// stay. Over HTTP, the proxy refuses requests that a browser sends for a web page of another
	// origin. It also refuses a request with an unexpected `Host`: the host must be a loopback
	// name, an IP address, a name of the listener's certificate, or the host of address or of one
	// of advertiseClientURLs.
	Gateway bool `yaml:"gateway" default:"true"`
	// InsecurePlaintext allows a listener without TLS on an address that other machines reach.
	// Every value then crosses the network in plaintext, and anyone who reaches the port can read
	// all of them.
	InsecurePlaintext bool `yaml:"insecurePlaintext" default:"false"`
}

// FileMode returns Mode as a number. Load has checked it.
func (l Listener) FileMode() fs.FileMode {
	m, _ := parseMode(l.Mode)
	return m
}

// ListenerTLS is the server side of TLS. All files are read again when they change. Open
// connections end within seconds when their client certificate expires or is revoked, or when its
// CA is removed.
type ListenerTLS struct {
	// CertFile contains the server's certificate and its chain, as PEM.
	CertFile string `yaml:"certFile" required:"true" file:"true"`
	// KeyFile contains the certificate's private key, as PEM.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
	// ClientCAFile contains the CA certificates, as PEM, that client certificates are verified
	// with. When it is set, a client without a certificate cannot connect.
	ClientCAFile string `yaml:"clientCAFile" file:"true"`
	// ClientCRLFile contains a list of revoked client certificates, as PEM or DER. Needs
	// clientCAFile.
	ClientCRLFile string `yaml:"clientCRLFile" file:"true"`
	// MinVersion is the oldest TLS version that is accepted: `"1.2"` or `"1.3"`.
	MinVersion string `yaml:"minVersion" default:"1.2"`
	// CipherSuites restricts TLS 1.2 to these suites, by their IANA names or by etcd's. When
	// empty, Go's secure suites are used. Suites with known weaknesses are refused; those of TLS
	// 1.3 cannot be chosen.
	CipherSuites []string `yaml:"cipherSuites"`
}

// Etcd is the cluster behind the proxy.
type Etcd struct {
	// Endpoints are the client URLs of one or more members: `https://host:port`, `http://host:port`
	// or `unix:///path`, all of one kind.
	Endpoints []string `yaml:"endpoints" required:"true"`
	// HTTPEndpoints are the URLs at which etcd serves HTTP, one for each of endpoints, in the same
	// order: `https://host:port`, `http://host:port` or `unix:///path`. They are needed if etcd
	// runs with `--listen-client-http-urls`, which removes HTTP from its client URLs. Without them,
	// `/health`, `/livez`, `/readyz`, `/version` and `/metrics` on the listeners fail with
	// 502. The JSON gateway does not need them. When empty, endpoints are used.
	HTTPEndpoints []string `yaml:"httpEndpoints"`
	// TLS is how `https://` endpoints are verified and how the proxy identifies itself. Without
	// this block, the system's CA certificates are trusted.
	TLS *EtcdTLS `yaml:"tls"`
	// Username is a user of etcd for the requests of the proxy itself and of the commands, if
	// etcd's authentication is on. It needs to read and write the keys under the rules, below
	// `coordination.prefix` and below `/etcd-kms-proxy/`. Clients use their own tokens, as without
	// the proxy. Needs passwordFile.
	Username string `yaml:"username"`
	// PasswordFile contains the user's password. White space at its end is ignored. It is read at
	// each login. If etcd refuses a changed password, the last accepted one is tried.
	PasswordFile string `yaml:"passwordFile" file:"true"`
	// MaxRequestBytes is the value of etcd's flag `--max-request-bytes` before the proxy was added.
	// Larger requests are refused with etcd's own error, measured before values are encrypted.
	// Raise etcd's flag above it by 1 KiB for each put that a transaction can contain, because
	// encrypted values are longer.
	MaxRequestBytes int `yaml:"maxRequestBytes" default:"1572864"`
}

// EtcdTLS is the client side of TLS towards etcd.
type EtcdTLS struct {
	// CAFile contains the CA certificates, as PEM, that etcd's certificate is verified with. When
	// empty, the system's are used.
	CAFile string `yaml:"caFile" file:"true"`
	// CertFile contains the proxy's client certificate, as PEM. If etcd's authentication is on, it
	// should have no common name: otherwise clients without a token become that user. Needs
	// keyFile.
	CertFile string `yaml:"certFile" file:"true"`
	// KeyFile contains the certificate's private key, as PEM. Needs certFile.
	KeyFile string `yaml:"keyFile" file:"true"`
	// ServerName is verified instead of the endpoint's own name or IP address.
	ServerName string `yaml:"serverName"`
	// InsecureSkipVerify turns off the verification of etcd's certificate. Anyone between the proxy
	// and etcd can then change what is stored.
	InsecureSkipVerify bool `yaml:"insecureSkipVerify" default:"false"`
}

// Rule says what happens to the values of the keys below a prefix.
type Rule struct {
	// Prefix is what the keys begin with, e.g. `/registry/secrets/`. `""` is every key. Two rules
	// must not have the same prefix. Bytes that are not UTF-8 are written in base64 after YAML's
	// tag `!!binary`: `prefix: !!binary /0E=` is the byte FF and an A. `"\xff"` is the character
	// U+00FF instead, with the bytes C3 BF.
	Prefix string `yaml:"prefix" required:"present" binary:"true"`
	// WriteWith is the name of the KMS provider that encrypts new values, or `plaintext`.
	WriteWith string `yaml:"writeWith" required:"true"`
	// ReadWith are more providers whose values may be read, in addition to writeWith. Providers of
	// kind kubernetes are allowed only here.
	ReadWith []string `yaml:"readWith"`
	// Recovery are more providers that also wrap each DEK seed of writeWith: another region,
	// another vendor, a key file. Their recovery copies are stored in every value. They decrypt it
	// if the key of its own provider is gone or its KMS does not answer, and never if that key is
	// disabled. The same is true for the copies of the providers in readWith. Rules with the same
	// writeWith have the same recovery. The name of a recovery provider consists of lower-case
	// letters, digits, `-` and `.`.
	Recovery []string `yaml:"recovery"`
	// RecoveryRequired refuses to encrypt under a DEK seed without a copy of every provider in
	// recovery. Without it, such a DEK seed is used, and replaced when that provider wraps again.
	RecoveryRequired bool `yaml:"recoveryRequired" default:"false"`
	// AllowPlaintextReads returns plaintext, and values that other software has encrypted, as they
	// are stored: for data from before the proxy. `false` refuses them, so that a client that can
	// write to etcd directly cannot inject values.
	AllowPlaintextReads bool `yaml:"allowPlaintextReads" default:"true"`
	// OnUndecryptable is the response to a read of a value that can never be decrypted, because the
	// value is damaged or its key is gone, and no recovery copy decrypts it. `error` fails the
	// read. `passthrough` returns the stored bytes, so that one damaged value does not make its
	// whole list unreadable for plain etcd clients. kube-apiserver then refuses the list itself,
	// and names the damaged objects. An outage is always an error. So is a key that can come back:
	// disabled, pending deletion, without its material, or denied. Only Alibaba Cloud KMS reports
	// that a key is gone: a plugin does not distinguish that from pending deletion, and a version
	// can be put back into a key file. If a KMS refuses the DEK seed of a value without a reason,
	// `passthrough` applies after it has done so for five minutes while it unwrapped others.
	OnUndecryptable string `yaml:"onUndecryptable" default:"error"`
}

// Cache limits the unwrapped DEK seeds that are kept in memory.
type Cache struct {
	// Seeds is how many are kept, for all providers together. One DEK seed decrypts many values;
	// each takes about 1 KiB.
	Seeds int `yaml:"seeds" default:"10000"`
	// TTL is how long a DEK seed is used before the KMS must unwrap it again.
	TTL time.Duration `yaml:"ttl" default:"24h"`
	// ServeUnreachableFor is how long after its ttl a DEK seed still decrypts values while the KMS
	// does not answer. `0s` turns this off.
	ServeUnreachableFor time.Duration `yaml:"serveUnreachableFor" default:"24h"`
	// SealUnreachableFor is how long after the last good health check of the KMS values are still
	// encrypted. With `0s`, values are encrypted only while the last health check was good.
	SealUnreachableFor time.Duration `yaml:"sealUnreachableFor" default:"24h"`
	// RevokeWithin is how soon after its KMS key is disabled a DEK seed is no longer used, and how
	// long the KMS must have denied access before that counts as revocation. It shortens
	// pollInterval. Behind a plugin that does not say why it refuses, the other limits apply
	// instead.
	RevokeWithin time.Duration `yaml:"revokeWithin" default:"1m"`
}

// Coordination is what the proxy stores in etcd and reads from it for itself. It announces itself,
// so that `etcd-kms-proxy status` finds a proxy with other rules. Before it serves, it compares its
// rules with those that the proxies last agreed on, and refuses rules that protect keys less. It
// also watches for plaintext that is written to etcd directly, under a rule.
type Coordination struct {
	// Enabled turns it on. After the proxies have agreed on rules, turning it off needs
	// `serve --allow-weakening`.
	Enabled bool `yaml:"enabled" default:"true"`
	// Prefix is the prefix of the keys that the proxies store in etcd. It ends in `/`, the prefix
	// of no rule begins with it, and clients of the proxy may not write below it. All proxies in
	// front of one etcd have the same prefix. It is recorded below `/etcd-kms-proxy/`, so a change
	// needs `serve --allow-weakening`.
	Prefix string `yaml:"prefix" default:"/etcd-kms-proxy/"`
	// WatchBypass watches all keys under rules that encrypt, for plaintext.
	WatchBypass bool `yaml:"watchBypass" default:"true"`
}

// Admin is an HTTP server without TLS or authentication for metrics and health. It serves nothing
// that etcd stores.
type Admin struct {
	// Address is `host:port` for /metrics, /livez and /readyz. Port 0 selects a free port, which is
	// logged.
	Address string `yaml:"address" default:"127.0.0.1:9379"`
	// Pprof serves Go's profiles under /debug/pprof, on a loopback address only.
	Pprof bool `yaml:"pprof" default:"false"`
}

// Audit is the audit log: JSON objects, one per line, each chained to the one before by a hash.
// `etcd-kms-proxy audit verify` checks it. It never contains a value or a key.
type Audit struct {
	// Path is the file that is written, mode `0600`. Its folder must exist. Older files are next to
	// it, with a number after their name. It must not be a symbolic link, and each proxy needs its
	// own file. Commands with the same configuration write to other files next to it: to
	// `NAME.commands.jsonl` for `NAME.jsonl`, and `kms serve-plugin` to
	// `NAME.plugin-PROVIDER.jsonl`.
	Path string `yaml:"path" required:"true"`
	// MaxSizeMiB is the maximum size of a file, in MiB. Then a new file begins.
	MaxSizeMiB int `yaml:"maxSizeMiB" default:"100"`
	// MaxFiles is how many files are kept, including the current one. The oldest is removed.
	MaxFiles int `yaml:"maxFiles" default:"10"`
	// KeyFile contains a key of 32 to 4,096 random bytes, with the owner and mode of
	// kms[].local.keyFile. It makes the hashes HMACs, so that the log cannot be rewritten without
	// the key. All bytes of the file are part of the key. It is read at the start. A log cannot
	// change its key: move the log and its older files away first.
	KeyFile string `yaml:"keyFile" file:"true"`
	// Required refuses to encrypt and decrypt values, to call a KMS, and to reload while the log
	// cannot be written, with Unavailable. Keys without a rule are still served. With `false`, the
	// proxy continues, counts the lost records, and records the number.
	Required bool `yaml:"required" default:"false"`
}

// Log sets what is logged. Values, KMS keys and credentials are never logged.
type Log struct {
	// Level is the lowest level that is logged: `debug`, `info`, `warn` or `error`.
	Level string `yaml:"level" default:"info"`
	// Format is `json`, one JSON object per line, or `text`.
	Format string `yaml:"format" default:"json"`
}
