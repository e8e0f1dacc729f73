package config

import (
	"io/fs"
	"time"
)

// Config is the whole file.
//
// Durations are written as Go writes them: `90s`, `1m`, `24h`. A relative file name counts from the folder of the configuration file.
// Secrets never stand in the file, only the names of files or environment variables that hold them. Anchors, aliases and a second document are
// refused.
type Config struct {
	// APIVersion is always `etcd-kms-proxy.io/v1alpha1`.
	APIVersion string `yaml:"apiVersion" required:"true"`
	// Kind is always `ProxyConfiguration`.
	Kind string `yaml:"kind" required:"true"`
	// Listeners are where clients connect. Their allowedClients and ciphertextClients are reloaded; any other change needs a restart.
	Listeners []Listener `yaml:"listeners" required:"true"`
	// Etcd is the cluster behind the proxy. A change needs a restart.
	Etcd Etcd `yaml:"etcd" required:"true"`
	// KMS are the providers of keys that rules refer to by name. A change needs a restart.
	KMS []KMS `yaml:"kms"`
	// Rules say which keys are sealed, and how. The longest prefix that fits a key counts; what fits none passes untouched. Rules are reloaded.
	Rules []Rule `yaml:"rules"`
	// Cache bounds how long and how many unwrapped seeds are kept, and what still works while a KMS is silent. A change needs a restart.
	Cache Cache `yaml:"cache"`
	// Coordination is how the proxies before one etcd know of each other. A change needs a restart.
	Coordination Coordination `yaml:"coordination"`
	// Admin is the HTTP server for metrics and health. Without this block there is none. A change needs a restart.
	Admin *Admin `yaml:"admin"`
	// Audit is a log of every call of a KMS, every denied client and every reload that shows when it was tampered with. Without this block there is none. A
	// change needs a restart.
	Audit *Audit `yaml:"audit"`
	// Log is what is logged, on standard error. The level is reloaded.
	Log Log `yaml:"log"`
}

// Listener is an address that clients connect to.
type Listener struct {
	// Address is `host:port`, or `unix:///path` for a socket. Port 0 takes a free port, which is logged. A host that is not a loopback
	// address needs TLS with client certificates, or insecurePlaintext. `systemd://NAME` takes the sockets that systemd passes under the name that
	// `FileDescriptorName=` of a socket unit gives them; what they may be without TLS is checked when the proxy starts.
	Address string `yaml:"address" required:"true"`
	// Mode is the permission of a unix socket, in octal. Every user who may write to the socket may read every value. A socket unit of systemd has
	// `SocketMode=` instead.
	Mode string `yaml:"mode" default:"0600"`
	// TLS is required for addresses that other machines reach.
	TLS *ListenerTLS `yaml:"tls"`
	// AllowedClients are the common names or subject alternative names of client certificates that may connect. When empty, any certificate of
	// clientCAFile may. Needs clientCAFile. When the list is reloaded, the connections of clients that it treats differently end.
	AllowedClients []string `yaml:"allowedClients"`
	// CiphertextClients are the names of client certificates that get stored bytes instead of
	// values and may only read: for backups, and as the source of a mirror. Every method that
	// changes something is refused: puts, deletes, leases, compaction, defragmentation, users,
	// members. They may connect without being among allowedClients. Needs clientCAFile.
	CiphertextClients []string `yaml:"ciphertextClients"`
	// AdvertiseClientURLs are put in place of the client URLs of etcd's members in what clients are told of them, so that a client that goes to the members' own URLs stays with
	// the proxy. Of a member that some listener leads to (see endpoint) they are that listener's, of the others this one's. When empty, members' URLs pass as they are.
	AdvertiseClientURLs []string `yaml:"advertiseClientURLs"`
	// Endpoint is one of `etcd.endpoints`: the only one that this listener leads to. With a listener for each member, a client can ask a particular one for its status, a snapshot
	// or a defragmentation. When empty, the listener leads to all endpoints.
	Endpoint string `yaml:"endpoint"`
	// Gateway serves etcd's JSON gateway, the paths under `/v3/`. `false` turns it off, as etcd's own `--enable-grpc-gateway=false` does; `/health`, `/livez`, `/readyz`,
	// `/version` and `/metrics` stay. Over HTTP, a request whose `Host` is no loopback name, no IP address, no name of the listener's certificate, not the host of address
	// and not that of one of advertiseClientURLs is refused, and so is one that a browser sends for a web page of another origin.
	Gateway bool `yaml:"gateway" default:"true"`
	// InsecurePlaintext allows a listener without TLS on an address that other machines reach. Every value then crosses the network in the
	// clear, and anyone who reaches the port reads all of them.
	InsecurePlaintext bool `yaml:"insecurePlaintext" default:"false"`
}

// FileMode returns Mode as a number. Load has checked it.
func (l Listener) FileMode() fs.FileMode {
	m, _ := parseMode(l.Mode)
	return m
}

// ListenerTLS is the server side of TLS. All files are read again when they change. Open connections end within seconds when their client certificate expires or is revoked, or when
// its CA is removed.
type ListenerTLS struct {
	// CertFile holds the server's certificate and its chain, as PEM.
	CertFile string `yaml:"certFile" required:"true" file:"true"`
	// KeyFile holds the certificate's private key, as PEM.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
	// ClientCAFile holds the certificates, as PEM, that client certificates are verified against. When it is set, a client without a
	// certificate cannot connect.
	ClientCAFile string `yaml:"clientCAFile" file:"true"`
	// ClientCRLFile holds a list of revoked client certificates, as PEM or DER. Needs clientCAFile.
	ClientCRLFile string `yaml:"clientCRLFile" file:"true"`
	// MinVersion is the oldest version of TLS that is spoken: `"1.2"` or `"1.3"`.
	MinVersion string `yaml:"minVersion" default:"1.2"`
	// CipherSuites restricts TLS 1.2 to these suites, by their IANA names. When empty, Go's secure suites are used. Suites with known
	// weaknesses are refused; those of TLS 1.3 cannot be chosen.
	CipherSuites []string `yaml:"cipherSuites"`
}

// Etcd is the cluster behind the proxy.
type Etcd struct {
	// Endpoints are the client URLs of one or more members: `https://host:port`, `http://host:port` or `unix:///path`, all of one kind.
	Endpoints []string `yaml:"endpoints" required:"true"`
	// HTTPEndpoints are the URLs where etcd serves HTTP, one for each of endpoints, in the same order: `https://host:port`, `http://host:port` or `unix:///path`. They are
	// needed where etcd runs with `--listen-client-http-urls`, which takes HTTP off its client URLs: without them, `/health`, `/livez`, `/readyz`, `/version` and
	// `/metrics` on the listeners are then answered with 502. The JSON gateway does not need them. When empty, endpoints are used.
	HTTPEndpoints []string `yaml:"httpEndpoints"`
	// TLS is how `https://` endpoints are verified and how the proxy identifies itself. Without this block, the system's certificates are
	// trusted.
	TLS *EtcdTLS `yaml:"tls"`
	// Username is a user of etcd, where etcd's authentication is on, for requests of the proxy's own and of the commands that work on etcd. It needs to read and
	// write the keys under the rules, below `coordination.prefix` and below `/etcd-kms-proxy/`. Clients bring their own tokens, as without the proxy. Goes with passwordFile.
	Username string `yaml:"username"`
	// PasswordFile holds the user's password. White space at its end does not count. It is read at
	// each login; if etcd refuses a changed password, the last that it took is tried.
	PasswordFile string `yaml:"passwordFile" file:"true"`
	// MaxRequestBytes is what etcd's own flag `--max-request-bytes` was before the proxy came: larger requests are refused with etcd's own
	// error, measured before values are sealed. Raise etcd's flag above it by a KiB for each put of a transaction, to make room for what sealing adds.
	MaxRequestBytes int `yaml:"maxRequestBytes" default:"1572864"`
}

// EtcdTLS is the client side of TLS towards etcd.
type EtcdTLS struct {
	// CAFile holds the certificates, as PEM, that etcd's are verified against. When empty, the system's are used.
	CAFile string `yaml:"caFile" file:"true"`
	// CertFile holds the proxy's client certificate, as PEM. It should have no common name if etcd's authentication is on, or clients without
	// a token become that user. Goes with keyFile.
	CertFile string `yaml:"certFile" file:"true"`
	// KeyFile holds the certificate's private key, as PEM. Goes with certFile.
	KeyFile string `yaml:"keyFile" file:"true"`
	// ServerName is verified in place of the endpoint's own name or IP address.
	ServerName string `yaml:"serverName"`
	// InsecureSkipVerify turns off the verification of etcd's certificate: whoever is between the proxy and etcd can then change what is stored.
	InsecureSkipVerify bool `yaml:"insecureSkipVerify" default:"false"`
}

// Rule says what happens to the values of the keys below a prefix.
type Rule struct {
	// Prefix is what the keys begin with, e.g. `/registry/secrets/`. `""` is every key. Two rules
	// may not have the same one. Bytes that are not UTF-8 are written in base64 behind YAML's tag
	// `!!binary`: `prefix: !!binary /0E=` is the byte FF and an A. `"\xff"` is the character U+00FF
	// instead, of the bytes C3 BF.
	Prefix string `yaml:"prefix" required:"present" binary:"true"`
	// WriteWith is the name of the KMS provider that new values are sealed with, or `plaintext`.
	WriteWith string `yaml:"writeWith" required:"true"`
	// ReadWith are further providers whose values open, beside the one of writeWith. Providers of kind kubernetes can stand here only.
	ReadWith []string `yaml:"readWith"`
	// Recovery are further providers that wrap each seed of writeWith too: another region, another vendor, a key file kept offline. Their copies
	// stand in every value. They open it when the key of its own provider is gone or its KMS does not answer, and never when that key is disabled.
	// So do the copies of the providers in readWith. Rules with the same writeWith have the same recovery. A recovery provider's name consists of lower-case
	// letters, digits, `-` and `.`.
	Recovery []string `yaml:"recovery"`
	// RecoveryRequired refuses to seal under a seed that one of recovery did not wrap. Without it, such a seed is used, and replaced once that
	// provider wraps again.
	RecoveryRequired bool `yaml:"recoveryRequired" default:"false"`
	// AllowPlaintextReads hands on values that are plaintext or sealed by someone else, as they are stored: for data from before the proxy.
	// `false` refuses them, so that whoever can write to etcd cannot slip in values of their own.
	AllowPlaintextReads bool `yaml:"allowPlaintextReads" default:"true"`
	// OnUndecryptable is what reading a value does that can never be opened (damaged, or of another key, or of a key that the KMS does not know any
	// more, without a recovery copy that opens it): `error`, or `passthrough`, which hands on the stored bytes, so that one damaged value does not make
	// its whole list unreadable for plain etcd clients; kube-apiserver then refuses the list itself, and names the damaged objects. An outage is always an error, and so is a
	// key that may come back: disabled, pending deletion, without its material, or denied. That a key is gone is known of Alibaba Cloud KMS alone: a
	// plugin does not tell it from pending deletion, and a version can be put back into a key file. Where a KMS refuses a value's seed without a
	// reason, `passthrough` applies once it has done so for five minutes while it unwrapped others.
	OnUndecryptable string `yaml:"onUndecryptable" default:"error"`
}

// Cache bounds the unwrapped seeds that are kept in memory.
type Cache struct {
	// Seeds is how many are kept, for all providers together. One seed opens many values; each takes about 1 KiB.
	Seeds int `yaml:"seeds" default:"10000"`
	// TTL is how long a seed is used before the KMS is asked again.
	TTL time.Duration `yaml:"ttl" default:"24h"`
	// ServeUnreachableFor is how long after its ttl a seed still opens values while the KMS does not answer. `0s` is not at all.
	ServeUnreachableFor time.Duration `yaml:"serveUnreachableFor" default:"24h"`
	// SealUnreachableFor is how long after the KMS last answered well values are still sealed. `0s` is only while it answers well.
	SealUnreachableFor time.Duration `yaml:"sealUnreachableFor" default:"24h"`
	// RevokeWithin is how soon after its KMS key is disabled a seed goes out of use, and how long the KMS must have denied access before that
	// counts as revocation. It shortens pollInterval. Behind a plugin that does not say why it refuses, the other limits hold instead.
	RevokeWithin time.Duration `yaml:"revokeWithin" default:"1m"`
}

// Coordination is what the proxy asks of etcd for itself: it announces itself there, so that `etcd-kms-proxy status` finds a proxy with other rules than the rest;
// before it serves, it compares its rules with those that the proxies last agreed on, and refuses to protect keys less; and it watches for plaintext that is written
// under a rule past the proxies.
type Coordination struct {
	// Enabled turns it on. To turn it off once rules are agreed on needs `serve --allow-weakening`.
	Enabled bool `yaml:"enabled" default:"true"`
	// Prefix is of the keys that the proxies keep in etcd. It ends in `/`, no rule's prefix may begin with it, and clients of the proxy may not write below it. All
	// proxies before one etcd have the same one; where it is stands below `/etcd-kms-proxy/`, so to change it needs `serve --allow-weakening`.
	Prefix string `yaml:"prefix" default:"/etcd-kms-proxy/"`
	// WatchBypass watches all keys under rules that seal.
	WatchBypass bool `yaml:"watchBypass" default:"true"`
}

// Admin is an HTTP server without TLS or authentication for metrics and health; it serves nothing of what etcd stores.
type Admin struct {
	// Address is `host:port` for /metrics, /livez and /readyz. Port 0 takes a free port, which is logged.
	Address string `yaml:"address" default:"127.0.0.1:9379"`
	// Pprof serves Go's profiles under /debug/pprof, on a loopback address only.
	Pprof bool `yaml:"pprof" default:"false"`
}

// Audit is the audit log: a JSON object a line, each chained to the one before by a hash. `etcd-kms-proxy audit verify` checks it. It never holds a value or a
// key.
type Audit struct {
	// Path is the file that is written, mode `0600`. Its folder must exist. Older files stand beside it, with a number behind their name. It may not be a
	// symbolic link, and each proxy needs its own. Commands with the same configuration write beside it: to `NAME.commands.jsonl`, for `NAME.jsonl`, and
	// `kms serve-plugin` to `NAME.plugin-PROVIDER.jsonl`.
	Path string `yaml:"path" required:"true"`
	// MaxSizeMiB is the size of a file, in MiB, beyond which a new one begins.
	MaxSizeMiB int `yaml:"maxSizeMiB" default:"100"`
	// MaxFiles is how many files are kept, with the one in use. The oldest is removed.
	MaxFiles int `yaml:"maxFiles" default:"10"`
	// KeyFile holds a key of 32 to 4,096 random bytes, with the owner and mode of
	// kms[].local.keyFile, which makes the hashes HMACs: who does not have it cannot rewrite the
	// log. All bytes of the file count. It is read at the start. A log cannot change its key: move
	// it and its older files away.
	KeyFile string `yaml:"keyFile" file:"true"`
	// Required refuses to seal and to open values, to call a KMS, and to reload, while the log cannot be written, with Unavailable. Keys outside the rules are
	// served. When `false`, the proxy goes on, counts the records that are lost, and writes how many there were.
	Required bool `yaml:"required" default:"false"`
}

// Log is what is logged. Values, keys of the KMS and credentials never are.
type Log struct {
	// Level is the least that is logged: `debug`, `info`, `warn` or `error`.
	Level string `yaml:"level" default:"info"`
	// Format is `json`, a JSON object a line, or `text`.
	Format string `yaml:"format" default:"json"`
}
