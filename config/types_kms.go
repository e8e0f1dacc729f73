package config

import "time"

// KMS is a provider of keys: a name, and exactly one of alibaba, plugin and local.
type KMS struct {
	// Name becomes part of every value that is stored, so never change it while there are such values. Letters, digits, `-`, `_` and `.`,
	// at most 63. To take over the values of a kube-apiserver with a KMS v2 provider, use that provider's name.
	Name string `yaml:"name" required:"true"`
	// PollInterval is how often the key's state is asked for while all is well; cache.revokeWithin shortens it. While something is wrong, it is
	// every 10 seconds.
	PollInterval time.Duration `yaml:"pollInterval" default:"1m"`
	// SeedMaxAge is how long values are sealed under one seed before the next is minted. A new KMS key version mints one at once.
	SeedMaxAge time.Duration `yaml:"seedMaxAge" default:"168h"`
	// SeedMaxSeals is how many values are sealed under one seed before the next is minted. Every value has a key of its own in any case.
	SeedMaxSeals int64 `yaml:"seedMaxSeals" default:"4294967296"`
	// Alibaba is a key of Alibaba Cloud KMS.
	Alibaba *Alibaba `yaml:"alibaba"`
	// Plugin is any Kubernetes KMS v2 plugin.
	Plugin *Plugin `yaml:"plugin"`
	// Local is a key file: for development, tests, and machines whose disk is protected otherwise.
	Local *Local `yaml:"local"`
}

// Alibaba is a key of Alibaba Cloud KMS, reached over HTTPS. The caller needs kms:GenerateDataKey, kms:Encrypt, kms:Decrypt and kms:DescribeKey.
type Alibaba struct {
	// Region is the key's region, e.g. `cn-hangzhou`.
	Region string `yaml:"region" required:"true"`
	// KeyID is the key's id (`key-…`), an alias (`alias/…`) or an ARN. Stored values name the real id, so an alias may be moved to another
	// key, which then counts as a rotation.
	KeyID string `yaml:"keyID" required:"true"`
	// Endpoint is `host` or `host:port`. When empty, it is the region's public endpoint; a dedicated instance has its own.
	Endpoint string `yaml:"endpoint"`
	// CAFile holds the certificates, as PEM, that the endpoint's is verified against. When empty, the system's are used.
	CAFile string `yaml:"caFile" file:"true"`
	// EncryptionContext is bound to every wrapped seed and needed again to unwrap it: changing it makes existing values unreadable.
	EncryptionContext map[string]string `yaml:"encryptionContext"`
	// Credentials say as whom the KMS is called.
	Credentials AlibabaCredentials `yaml:"credentials"`
}

// AlibabaCredentials come from files, read again at each use. Each part without a file comes from the environment:
// ALIBABA_CLOUD_ACCESS_KEY_ID, ALIBABA_CLOUD_ACCESS_KEY_SECRET and ALIBABA_CLOUD_SECURITY_TOKEN.
type AlibabaCredentials struct {
	// Type is `accessKey`, or `sts` for one with a security token.
	Type string `yaml:"type" default:"accessKey"`
	// AccessKeyIDFile holds the access key's id.
	AccessKeyIDFile string `yaml:"accessKeyIDFile" file:"true"`
	// AccessKeySecretFile holds the access key's secret.
	AccessKeySecretFile string `yaml:"accessKeySecretFile" file:"true"`
	// SecurityTokenFile holds the security token of type sts.
	SecurityTokenFile string `yaml:"securityTokenFile" file:"true"`
}

// Plugin is the socket of a Kubernetes KMS v2 plugin.
type Plugin struct {
	// Endpoint is `unix:///path`. The plugin need not be there yet when the proxy starts.
	Endpoint string `yaml:"endpoint" required:"true"`
	// Timeout bounds one call.
	Timeout time.Duration `yaml:"timeout" default:"3s"`
}

// Local is a versioned key file, made by `etcd-kms-proxy kms new-local-key`: the last version wraps, all of them unwrap. It is read again when it changes.
type Local struct {
	// KeyFile is the file. It is refused if the group or others may read it.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
}
