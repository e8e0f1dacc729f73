package config

import "time"

// KMS is a provider of keys: a name, and exactly one of alibaba, plugin, local and kubernetes.
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
	// Kubernetes opens what kube-apiserver itself sealed with keys of its configuration. Nothing is written with it: name it in readWith only.
	Kubernetes *Kubernetes `yaml:"kubernetes"`
}

// Alibaba is a key of Alibaba Cloud KMS, reached over HTTPS. The caller needs kms:GenerateDataKey, kms:Encrypt, kms:Decrypt and kms:DescribeKey on
// the key; `kms check --policy` prints the RAM policy.
type Alibaba struct {
	// Region is the key's region, e.g. `cn-hangzhou`.
	Region string `yaml:"region" required:"true"`
	// KeyID is the key's id (`key-…`), an alias (`alias/…`) or an ARN. Stored values name the real id, so an alias may be moved to another
	// key, which then counts as a rotation.
	KeyID string `yaml:"keyID" required:"true"`
	// Endpoint is `host` or `host:port`. When empty, it is the region's public endpoint, `kms.<region>.aliyuncs.com`; in a VPC there is
	// `kms-vpc.<region>.aliyuncs.com`, and a dedicated instance has its own, `<instance>.cryptoservice.kms.aliyuncs.com`.
	Endpoint string `yaml:"endpoint"`
	// CAFile holds the certificates, as PEM, that the endpoint's is verified against: a dedicated instance has a CA of its own. When empty, the
	// system's are used. It is read again when it changes.
	CAFile string `yaml:"caFile" file:"true"`
	// EncryptionContext is bound to every wrapped seed and needed again to unwrap it: changing it makes existing values unreadable.
	EncryptionContext map[string]string `yaml:"encryptionContext"`
	// Credentials say as whom the KMS is called.
	Credentials AlibabaCredentials `yaml:"credentials"`
}

// AlibabaCredentials say as whom the KMS is called. Only the type that is named is tried, and secrets come from files or from the environment.
//
// Files of accessKey and sts are read again at each use. The other types give sessions that end: the next one is fetched well before, and while
// that fails the old one is used until it ends.
type AlibabaCredentials struct {
	// Type is `accessKey`; `sts`, an access key with a security token; `ecsRAMRole`, the role of the ECS instance that the proxy runs on; `oidc`,
	// a role that a pod assumes with its service account's token (RRSA in ACK); or `assumeRole`, a role that is assumed with an access key or sts.
	Type string `yaml:"type" default:"accessKey"`
	// AccessKeyIDFile holds the access key's id, for accessKey, sts and assumeRole. When empty, it is in `ALIBABA_CLOUD_ACCESS_KEY_ID`.
	AccessKeyIDFile string `yaml:"accessKeyIDFile" file:"true"`
	// AccessKeySecretFile holds the access key's secret. When empty, it is in `ALIBABA_CLOUD_ACCESS_KEY_SECRET`.
	AccessKeySecretFile string `yaml:"accessKeySecretFile" file:"true"`
	// SecurityTokenFile holds the security token, for sts and for assumeRole with base sts. When empty, it is in `ALIBABA_CLOUD_SECURITY_TOKEN`.
	SecurityTokenFile string `yaml:"securityTokenFile" file:"true"`
	// Base is what assumeRole assumes the role with: `accessKey` or `sts`. When empty, it is an access key. It needs sts:AssumeRole on the role.
	Base string `yaml:"base"`
	// RoleARN is the role of oidc and assumeRole, `acs:ram::<account>:role/<name>`. When empty, it is in `ALIBABA_CLOUD_ROLE_ARN`.
	RoleARN string `yaml:"roleARN"`
	// OIDCProviderARN is the OIDC provider that RAM knows the cluster by. When empty, it is in `ALIBABA_CLOUD_OIDC_PROVIDER_ARN`.
	OIDCProviderARN string `yaml:"oidcProviderARN"`
	// OIDCTokenFile holds the token of oidc, read again for each session. When empty, `ALIBABA_CLOUD_OIDC_TOKEN_FILE` names it.
	OIDCTokenFile string `yaml:"oidcTokenFile" file:"true"`
	// ExternalID is what the trust policy of the role may ask of assumeRole.
	ExternalID string `yaml:"externalID"`
	// SessionName is how the audit logs of oidc's and assumeRole's role call the proxy. When empty, it is `etcd-kms-proxy`.
	SessionName string `yaml:"sessionName"`
	// Policy is a RAM policy, as JSON, that restricts the sessions of oidc and assumeRole further than the role does.
	Policy string `yaml:"policy"`
	// Duration is how long a session of oidc and assumeRole lives: `15m` up to what the role allows. When `0s`, it is an hour.
	Duration time.Duration `yaml:"duration"`
	// STSEndpoint is the `host` or `host:port` that oidc and assumeRole get their sessions from. When empty, it is the public endpoint of the
	// region, `sts.<region>.aliyuncs.com`; in a VPC there is `sts-vpc.<region>.aliyuncs.com`.
	STSEndpoint string `yaml:"stsEndpoint"`
	// STSCAFile holds the certificates, as PEM, that stsEndpoint's is verified against. When empty, the system's are used. It is read again when it
	// changes.
	STSCAFile string `yaml:"stsCAFile" file:"true"`
	// RoleName is the instance's role for ecsRAMRole. When empty, the metadata server is asked for its name.
	RoleName string `yaml:"roleName"`
	// AllowMetadataV1 lets ecsRAMRole speak the metadata server's old protocol where it gives no token: then whoever can make some program on the
	// machine fetch a URL can steal the credentials.
	AllowMetadataV1 bool `yaml:"allowMetadataV1" default:"false"`
}

// Plugin is the socket of a Kubernetes KMS v2 plugin.
type Plugin struct {
	// Endpoint is `unix:///path`, or `unix:///@name` for an abstract socket. The plugin need not be
	// there yet when the proxy starts.
	Endpoint string `yaml:"endpoint" required:"true"`
	// Timeout bounds one call.
	Timeout time.Duration `yaml:"timeout" default:"3s"`
}

// Local is a versioned key file, made by `etcd-kms-proxy kms new-local-key`: the last version wraps, all of them unwrap. It is read again when it changes.
type Local struct {
	// KeyFile is the file. It is refused unless it belongs to root or the proxy's user and nobody
	// else can use it: mode `0600` or `0400`, or `0640` or `0440` with a group that only the
	// proxy's user has, as in a Secret volume of a pod with `fsGroup`.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
}

// Kubernetes is the keys of one of kube-apiserver's own providers that are not KMS, for moving a cluster off it. `config from-kubernetes` makes the entry and the
// file from an EncryptionConfiguration. Of the provider's other fields none has an effect: its name stands in no value, and there is no seed.
type Kubernetes struct {
	// Type is the provider: `aescbc`, `aesgcm` or `secretbox`. A value that was sealed with aescbc may have been altered without a trace.
	Type string `yaml:"type" required:"true"`
	// KeyFile is a YAML file, `keys: [{name: key1, secret: <base64>}]`, with the keys as the
	// EncryptionConfiguration has them. Its owner and mode are those of local.keyFile. It is read
	// again when it changes.
	KeyFile string `yaml:"keyFile" required:"true" file:"true"`
}
