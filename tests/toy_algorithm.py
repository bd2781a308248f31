"A new algorithm in fifteen lines: train on drawn clips, each with its reward as weight."
from instructvideo_kit.tuning.algorithm import Algorithm
from instructvideo_kit.tuning.rollouts import draw_clips, draw_timesteps, judge, prediction_errors
from instructvideo_kit.tuning.stream import draw_noise


class Toy(Algorithm):
    name = "toy"

    def loss(self, positions):
        prompts, generators = self.captions_at(positions), self.generators_at(positions)
        z = draw_clips(self.policy, prompts, draw_noise(self.policy.latent_shape, generators), self.config)
        reward, eps = judge(self.policy, self.reward, z, prompts, self.config), draw_noise(self.policy.latent_shape,
            generators)
        errors = prediction_errors(self.policy, z, eps, draw_timesteps(self.policy, generators), prompts)
        return (reward.to(errors)*errors).mean(), {"reward": reward.mean()}

    @classmethod
    def step_cost(cls, config, guidance_scale=2.): return 2*config.n_ddim + 2
