package config

import "time"

// KMS is a provider of keys: a name, and exactly one of alibaba, plugin, local, kubernetes and
// age.
type KMS struct {
	// Name is part of every stored value, so never change it while there are such values. Letters,
	// digits, `-`, `_` and `.`, at most 63. To take over the values of a kube-apiserver with a KMS
	// v2 provider, use the name of that provider.
	Name string `yaml:"name" required:"true"`
	// PollInterval is the time between two health checks of the KMS. cache.revokeWithin shortens
	// it. While something is wrong, it is 10 seconds.
	PollInterval time.Duration `yaml:"pollInterval" default:"1m"`
	// SeedMaxAge is how long one DEK seed encrypts values before the next one is generated. A new
	// KMS key version generates one at once.
	SeedMaxAge time.Duration `yaml:"seedMaxAge" default:"168h"`
	// SeedMaxSeals is how many values one DEK seed encrypts before the next one is generated. Every
	// value has its own key in any case.
	SeedMaxSeals int64 `yaml:"seedMaxSeals" default:"4294967296"`
	// Alibaba is a key of Alibaba Cloud KMS.
	Alibaba *Alibaba `yaml:"alibaba"`
	// Plugin is any Kubernetes KMS v2 plugin.
	Plugin *Plugin `yaml:"plugin"`
	// Local is a key file: for development, tests, and machines whose disk is protected in another
	// way.
	Local *Local `yaml:"local"`
	// Kubernetes decrypts what kube-apiserver itself has encrypted with keys of its configuration.
	// It never encrypts: use it in readWith only.
	Kubernetes *Kubernetes `yaml:"kubernetes"`
	// Age wraps recovery copies with public keys, whose private keys are offline. It never decrypts
	// values that clients read: use it in recovery only.
	Age *Age `yaml:"age"`
}

// Alibaba is a key of Alibaba Cloud KMS, reached over HTTPS. The caller needs kms:GenerateDataKey,
// kms:Encrypt, kms:Decrypt and kms:DescribeKey on the key; `kms check --policy` prints the RAM
// policy.
type Alibaba struct {
	// Region is the key's region, e.g. `cn-hangzhou`.
	Region string `yaml:"region" required:"true"`
	// KeyID is the key's ID (`key-…`), an alias (`alias/…`) or an ARN. Stored values name the real
	// ID, so an alias may be moved to another key, which then counts as a rotation.
	KeyID string `yaml:"keyID" required:"true"`
	// Endpoint is `host` or `host:port`. When empty, it is the region's public endpoint,
	// `kms.<region>.aliyuncs.com`. In a VPC there is `kms-vpc.<region>.aliyuncs.com`, and a
	// dedicated instance has its own, `<instance>.cryptoservice.kms.aliyuncs.com`.
	Endpoint string `yaml:"endpoint"`
	// CAFile contains the CA certificates, as PEM, that the endpoint's certificate is verified
	// with: a dedicated instance has its own CA. When empty, the system's are used. It is read
	// again when it changes.
	CAFile string `yaml:"caFile" file:"true"`
	// EncryptionContext is bound to every wrapped DEK seed and required to unwrap it. Changing it
	// makes existing values unreadable.
	EncryptionContext map[string]string `yaml:"encryptionContext"`
	// Credentials identify the caller of the KMS.
	Credentials AlibabaCredentials `yaml:"credentials"`
}

// AlibabaCredentials identify the caller of the KMS. Only the configured type is used. Secrets are
// in files or in the environment.
//
// Files of accessKey and sts are read again at each use. The other types provide sessions with an
// expiry: the next session is fetched well before, and while that fails the old one is used until
// it ends.
type AlibabaCredentials struct {
	// Type is `accessKey`; `sts`, an access key with a security token; `ecsRAMRole`, the role of
	// the ECS instance on which the proxy runs; `oidc`, a role that a Pod assumes with the token of
	// its service account (RRSA in ACK); or `assumeRole`, a role that is assumed with an access key
	// or sts.
	Type string `yaml:"type" default:"accessKey"`
	// AccessKeyIDFile contains the access key's ID, for accessKey, sts and assumeRole. When empty,
	// it is in `ALIBABA_CLOUD_ACCESS_KEY_ID`.
	AccessKeyIDFile string `yaml:"accessKeyIDFile" file:"true"`
	// AccessKeySecretFile contains the access key's secret. When empty, it is in
	// `ALIBABA_CLOUD_ACCESS_KEY_SECRET`.
	AccessKeySecretFile string `yaml:"accessKeySecretFile" file:"true"`
	// SecurityTokenFile contains the security token, for sts and for assumeRole with base sts. When
	// empty, it is in `ALIBABA_CLOUD_SECURITY_TOKEN`.
	SecurityTokenFile string `yaml:"securityTokenFile" file:"true"`
	// Base is the credential with which assumeRole assumes the role: `accessKey` or `sts`. When
	// empty, it is an access key. It needs sts:AssumeRole on the role.
	Base string `yaml:"base"`
	// RoleARN is the role of oidc and assumeRole, `acs:ram::<account>:role/<name>`. When empty, it
	// is in `ALIBABA_CLOUD_ROLE_ARN`.
	RoleARN string `yaml:"roleARN"`
	// OIDCProviderARN is the OIDC provider by which RAM identifies the cluster. When empty, it is
	// in `ALIBABA_CLOUD_OIDC_PROVIDER_ARN`.
	OIDCProviderARN string `yaml:"oidcProviderARN"`
	// OIDCTokenFile contains the token of oidc, read again for each session. When empty,
	// `ALIBABA_CLOUD_OIDC_TOKEN_FILE` names it.
	OIDCTokenFile string `yaml:"oidcTokenFile" file:"true"`
	// ExternalID is the external ID that the trust policy of the role can require from assumeRole.
	ExternalID string `yaml:"externalID"`
	// SessionName is the name of the proxy in the cloud's audit logs, for oidc and assumeRole. When
	// empty, it is `etcd-kms-proxy`.
	SessionName string `yaml:"sessionName"`
	// Policy is a RAM policy, as JSON, that restricts the sessions of oidc and assumeRole further
	// than the role does.
	Policy string `yaml:"policy"`
	// Duration is the lifetime of a session of oidc and assumeRole: `15m` up to what the role
	// allows. When `0s`, it is an hour.
	Duration time.Duration `yaml:"duration"`
	// STSEndpoint is the `host` or `host:port` from which oidc and assumeRole get their sessions.
	// When empty, it is the public endpoint of the region, `sts.<region>.aliyuncs.com`. In a VPC
	// there is `sts-vpc.<region>.aliyuncs.com`.
	STSEndpoint string `yaml:"stsEndpoint"`
	// STSCAFile contains the CA certificates, as PEM, that the certificate of stsEndpoint is
	// verified with. When empty, the system's are used. It is read again when it changes.
	STSCAFile string `yaml:"stsCAFile" file:"true"`
	// RoleName is the instance's role for ecsRAMRole. When empty, the proxy reads it from the
	// metadata server.
	RoleName string `yaml:"roleName"`
	// AllowMetadataV1 lets ecsRAMRole use the old protocol of a metadata server that gives no
	// token. Anyone who can make some program on the machine fetch a URL can then steal the
	// credentials.
	AllowMetadataV1 bool `yaml:"allowMetadataV1" default:"false"`
}

// Plugin is the socket of a Kubernetes KMS v2 plugin.
type Plugin struct {
	// Endpoint is `unix:///path`, or `unix:///@name` for an abstract socket. The plugin need not
	// run yet when the proxy starts.
	Endpoint string `yaml:"endpoint" required:"true"`
	// Timeout limits one call.
	Timeout time.Duration `yaml:"timeout" default:"3s"`
}

// Local is a versioned key file, created by `etcd-kms-proxy kms new-local-key`. The last version
// wraps, and all of them unwrap. It is read again when it changes.
type Local struct {
	// KeyFile is the file. It is refused unless it belongs to root or the proxy's user and no other
	// user can use it: mode `0600` or `0400`, or `0640` or `0440` with a group that only the
	// proxy's user has, as in a Secret volume of a Pod with `fsGroup`.
	KeyFile string `yaml:"keyFile" required:"true" file:"true" create:"etcd-kms-proxy kms new-local-key"`
}

// Kubernetes contains the keys of one of kube-apiserver's own providers that are not KMS, to
// migrate a cluster. `config from-kubernetes` creates the entry and the file from an
// EncryptionConfiguration. No value contains the name of the provider. There is no DEK seed, so
// pollInterval, seedMaxAge and seedMaxSeals are refused.
type Kubernetes struct {
	// Type is the provider: `aescbc`, `aesgcm` or `secretbox`. A value that was encrypted with
	// aescbc may have been altered without a trace.
	Type string `yaml:"type" required:"true"`
	// KeyFile is a YAML file, `keys: [{name: key1, secret: <base64>}]`, with the keys as in the
	// EncryptionConfiguration. Its owner and mode are those of local.keyFile. It is read again when
	// it changes.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
}

// Age has public keys of age (https://age-encryption.org), the recipients of recovery copies. Any
// one of their private keys, the identities, decrypts a copy. The identities stay offline: only the
// commands decrypt, verify, status, reencrypt, drill and kms check take them, with --identity.
// There is no KMS, so pollInterval, seedMaxAge and seedMaxSeals are refused. The recipients are
// those of recipients and those of recipientsFile, at least one.
type Age struct {
	// Recipients are public keys as `age-keygen` prints them: `age1…` (X25519) or `age1pq1…`
	// (post-quantum), or `age1tag1…` and `age1tagpq1…` of a hardware token. Post-quantum recipients
	// and others cannot be used together. Recipients that need a plugin to encrypt are refused.
	Recipients []string `yaml:"recipients"`
	// RecipientsFile contains more recipients, one on each line. Empty lines and lines that begin
	// with `#` are ignored. It is read again when it changes.
	RecipientsFile string `yaml:"recipientsFile" file:"true"`
}
